"""HiPPO: a memory of fixed equations keeps a signal's whole past, whatever its time scale."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from frame import Criterion, Figures, Reproduction, main
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from moescale.ops.discretize import discretize
from moescale.ops.hippo import hippo, legs_solve, legs_step, reconstruct
from moescale.ops.hippo_memory import Memory, hippo_memory

SAMPLES, SIZE, HOLD = 2000, 64, 8
PIXELS = 64 * HOLD


def noise(seed: int) -> Tensor:
    """Draw 10 seconds of noise of up to 1 Hz, of variance 1. Returns [SAMPLES] float64."""
    generator = np.random.default_rng(seed)
    spectrum = np.zeros(SAMPLES // 2 + 1, complex)
    spectrum[1:11] = generator.normal(size=10) + 1j * generator.normal(size=10)
    signal = np.fft.irfft(spectrum, SAMPLES)
    return torch.from_numpy(signal / signal.std())


def whole_past(signal: Tensor) -> Tensor:
    """Take a signal into a LegS memory, value by value, by the bilinear transform."""
    memory = torch.zeros(SIZE, dtype=torch.float64)
    for step, value in enumerate(signal, 1):
        memory = legs_step(memory, value, 1 / step)
    return memory


def reconstruction(seed: int) -> Figures:
    """Read a signal back from the memory, and see what the memory makes of one that is twice as slow."""
    signal = noise(seed)
    memory, slower = whole_past(signal), whole_past(signal.repeat_interleave(2))
    age = 1 - (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    read = reconstruct("legs", memory, age)
    # A window of a tenth of the time, read as if it were all of it.
    held, _ = hippo_memory(signal[None, :, None], torch.arange(SAMPLES)[None], Memory("legt", SIZE, SAMPLES / 10))
    wrong = reconstruct("legt", held[0, -1, 0], age)
    return {
        "error": float((read - signal).square().mean()), "wrong window": float((wrong - signal).square().mean()),
        "dilation": float((slower - memory).norm() / memory.norm()),
        "signal": signal[::10].tolist(), "read": read[::10].tolist(),
    }


def digits(seed: int) -> Figures:
    """Tell digits by what a memory holds when their permuted pixels, each held for some steps, have gone by."""
    images, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    order, pixels = generator.permutation(len(images)), generator.permutation(64)
    signal = torch.from_numpy(images[order][:, pixels] / 16).repeat_interleave(HOLD, 1)
    labels, train = labels[order], len(order) * 4 // 5
    matrix = torch.from_numpy(generator.normal(size=(SIZE, SIZE)) / SIZE)
    vector = torch.from_numpy(generator.normal(size=SIZE))
    memories: dict[str, Callable[[], Tensor]] = {
        "LegS": lambda: last_memory(signal, Memory("legs", SIZE)),
        "LegT": lambda: last_memory(signal, Memory("legt", SIZE, PIXELS)),
        "LegT, window / 10": lambda: last_memory(signal, Memory("legt", SIZE, PIXELS / 10)),
        "LagT": lambda: last_memory(signal, Memory("lagt", SIZE, HOLD)),
        "random A": lambda: last_state(signal, *discretize(matrix, vector, 1 / PIXELS, "bilinear")),
    }
    figures: Figures = {}
    for name, remember in memories.items():
        features = StandardScaler().fit_transform(remember().numpy())
        model = LogisticRegression(max_iter=2000).fit(features[:train], labels[:train])
        figures[name] = float(model.score(features[train:], labels[train:]))
    return figures


def last_memory(signal: Tensor, memory: Memory) -> Tensor:
    """Compute what is remembered at the end. signal: [rows, seq]. Returns [rows, size]."""
    state, seq = None, signal.shape[1]
    for first in range(0, seq, 64):
        positions = torch.arange(first, min(first + 64, seq)).expand(len(signal), -1)
        _, state = hippo_memory(signal[:, first : first + 64, None], positions, memory, state)
    assert state is not None
    return state[:, 0]


def last_state(signal: Tensor, a: Tensor, b: Tensor) -> Tensor:
    state = torch.zeros(len(signal), SIZE, dtype=torch.float64)
    for value in signal.T:
        state = state @ a.T + value[:, None] * b
    return state


def linear_time(seed: int) -> Figures:
    """Hold the solution of LegS's equation in a linear time to the dense one: its error, and the time of both."""
    size, step = 512, 1 / 300
    a, _ = hippo("legs", size)
    dense = torch.eye(size, dtype=torch.float64) - step * a
    right = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    exact, ours = torch.linalg.solve(dense, right), legs_solve(right, step)
    dense_seconds = median_seconds(lambda: torch.linalg.solve(dense, right))
    speed = dense_seconds / median_seconds(lambda: legs_solve(right, step))
    return {"solve": float((ours - exact).norm() / exact.norm()), "speed": speed}


def median_seconds(function: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(30):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def run(seed: int) -> Figures:
    return {**reconstruction(seed), **digits(seed), **linear_time(seed)}


def plot(figure: Any, runs: Sequence[Figures]) -> None:
    left, right = figure.subplots(1, 2)
    left.plot(runs[0]["signal"], color="tab:gray", linewidth=3, label="signal")
    left.plot(runs[0]["read"], color="tab:blue", linewidth=1, label=f"read from {SIZE} numbers")
    left.set(xlabel="sample / 10", title=f"LegS after {SAMPLES} samples")
    left.legend()
    names = ["LegS", "LegT", "LegT, window / 10", "LagT", "random A"]
    for index, figures in enumerate(runs):
        right.plot(names, [figures[name] for name in names], "o", color=f"C{index}", label=f"seed {index}")
    right.tick_params(axis="x", labelrotation=20)
    right.set(ylim=(0, 1), title="permuted digits, from the last memory")
    right.legend()


REPRODUCTION = Reproduction(
    title="HiPPO: memory of the whole past",
    paper="Gu, Dao, Ermon, Rudra, Re, NeurIPS 2020",
    claim="98.3 % on permuted MNIST with LegS (69.9 % with a random A, from secondary sources); no time scale to set",
    miniature=f"10 s of noise in {SIZE} numbers, dilated by 2; permuted 8x8 digits over {PIXELS} steps by the last "
              "memory alone; LegS's step in linear time",
    run=run,
    plot=plot,
    criteria=[
        Criterion("relative squared error read from LegS", lambda f: f["error"], at_most=1e-3),
        Criterion("the same of LegT with a window of a tenth", lambda f: f["wrong window"], at_least=1e-3),
        Criterion("change of LegS by dilation", lambda f: f["dilation"], at_most=1e-2),
        Criterion("digits, LegS", lambda f: f["LegS"], at_least=0.90),
        Criterion("digits, random A", lambda f: f["random A"], at_most=0.45),
        Criterion("digits, LegS above LegT with a window of a tenth", lambda f: f["LegS"] - f["LegT, window / 10"],
                  at_least=0.10),
        Criterion("error of the solution in linear time", lambda f: f["solve"], at_most=1e-12),
        Criterion("its speed against a dense solution, size 512", lambda f: f["speed"], at_least=5),
    ],
)

if __name__ == "__main__":
    main(REPRODUCTION)
