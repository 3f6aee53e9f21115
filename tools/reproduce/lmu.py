"""The Legendre memory unit: a window of any length is held in a few numbers, and learned delays are exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from frame import Criterion, Figures, Reproduction, main
from torch import Tensor, nn

from moescale.mixers.lmu import Lmu
from moescale.ops.hippo import reconstruct
from moescale.ops.hippo_memory import Memory, hippo_memory

PIECE = 8192  # positions whose memories are kept at a time
DELAYS, SEQ, STEPS, BATCH = (40, 80, 120, 160, 200), 500, 1500, 16


def noise(generator: np.random.Generator, rows: int, length: int, samples: int, hertz: int) -> Tensor:
    """Draw noise of up to `hertz` waves in `samples` values, of variance 1. Returns [rows, length] float64."""
    highest = length * hertz // samples
    spectrum = np.zeros((rows, length // 2 + 1), complex)
    spectrum[:, 1 : highest + 1] = generator.normal(size=(rows, highest)) + 1j * generator.normal(size=(rows, highest))
    signal = np.fft.irfft(spectrum, length)
    return torch.from_numpy(signal / signal.std())


def delays(seed: int, samples: int, order: int) -> list[float]:
    """Decode delays of 0 to `samples` positions from a memory of noise of up to 10 waves a window, without training.

    Returns the root mean square errors, relative to the signal, at five equally spaced delays.
    """
    signal = noise(np.random.default_rng(seed), 1, 5 * samples // 2, samples, 10)[0]
    # A value that is held for a position is half a position old on average when it is read.
    memory, asked = Memory("lmu", order, samples + 1), [index * samples // 4 for index in range(5)]
    age = (torch.tensor(asked, dtype=torch.float64) + 0.5) / (samples + 1)
    state, read = None, []
    for first in range(0, len(signal), PIECE):
        positions = torch.arange(first, min(first + PIECE, len(signal)))
        held, state = hippo_memory(signal[None, positions, None], positions[None], memory, state)
        read.append(reconstruct("lmu", held[0, :, 0], age))
    begin, decoded = samples + samples // 4, torch.cat(read)
    return [float((decoded[begin:, index] - signal[begin - delay : len(signal) - delay]).square().mean().sqrt()
                  / signal.std()) for index, delay in enumerate(asked)]


class Lstm(nn.Module):
    """Ten units, and a read-out of the delays."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 10, batch_first=True), nn.Linear(10, len(DELAYS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, :, :1])[0])


class DelayLmu(nn.Module):
    """A layer of the LMU, of as many features as there are delays."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Lmu(len(DELAYS), 1, 11, Memory("lmu", 40, DELAYS[-1] + 1), recurrent=False)
        for name, weight in self.mixer.named_parameters():
            nn.init.ones_(weight) if name == "e_x.weight" else nn.init.xavier_normal_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, torch.arange(x.shape[1]).expand(len(x), -1))


def learn(model: nn.Module, seed: int) -> Figures:
    """Train a model to give five delays of a signal. Returns the error on new signals, and the losses."""
    generator = np.random.default_rng(seed)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(STEPS):
        loss = delay_loss(model, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    with torch.no_grad():
        return {"error": float(delay_loss(model, np.random.default_rng(1000 + seed), 256)), "losses": losses[::10]}


def delay_loss(model: nn.Module, generator: np.random.Generator, rows: int = BATCH) -> Tensor:
    """Compute the mean squared error of all delays, where all of them lie within the sequence."""
    signal = 0.41 * noise(generator, rows, SEQ, 200, 5).float()
    x = torch.zeros(rows, SEQ, len(DELAYS))
    x[:, :, 0] = signal
    targets = torch.stack([signal[:, DELAYS[-1] - delay : SEQ - delay] for delay in DELAYS], 2)
    return (model(x)[:, DELAYS[-1] :] - targets).square().mean()


def run(seed: int) -> Figures:
    figures: Figures = {
        "order 100": delays(seed, 1000, 100), "order 16": delays(seed, 1000, 16), "long": delays(seed, 100_000, 100)}
    for name, model in (("LMU", DelayLmu()), ("LSTM", Lstm())):
        figures[f"{name} weights"] = sum(parameter.numel() for parameter in model.parameters())
        learned = learn(model, seed)
        figures[name], figures[f"{name} losses"] = learned["error"], learned["losses"]
    return figures


def plot(figure: Any, runs: Sequence[Figures]) -> None:
    left, right = figure.subplots(1, 2)
    for name, color in (("order 16", "tab:red"), ("order 100", "tab:blue"), ("long", "tab:green")):
        for index, figures in enumerate(runs):
            left.plot(range(5), figures[name], "o-", color=color, linewidth=1,
                      label={"long": "order 100, 100,000 positions"}.get(name, name) if index == 0 else None)
    left.set(yscale="log", xlabel="delay, quarters of the window", ylabel="relative error", title="not trained")
    left.set_xticks(range(5))
    left.legend(fontsize=7)
    for name, color in (("LSTM", "tab:gray"), ("LMU", "tab:blue")):
        for index, figures in enumerate(runs):
            right.plot(figures[f"{name} losses"], color=color, linewidth=1,
                       label=f"{name}, {figures[f'{name} weights']} weights" if index == 0 else None)
    right.set(yscale="log", xlabel="step / 10", ylabel="squared error", title="five delays, learned")
    right.legend(fontsize=7)


REPRODUCTION = Reproduction(
    title="LMU: delays of any length",
    paper="Voelker, Kajic, Eliasmith, NeurIPS 2019",
    claim="delays of up to 100,000 steps with 100 numbers and 500 weights, where LSTMs fail past about 1,000 (the "
          "latter from memory of the paper)",
    miniature="noise of up to 10 waves a window of 1,000 and 100,000 positions, decoded by fixed polynomials; five "
              "delays learned by an LMU layer and by an LSTM of as many weights",
    run=run,
    plot=plot,
    criteria=[
        Criterion("1,000 positions, order 100: worst error within", lambda f: max(f["order 100"][:4]), at_most=2e-3),
        Criterion("the same at the window's edge", lambda f: f["order 100"][4], at_most=0.08),
        Criterion("100,000 positions, order 100: worst error within", lambda f: max(f["long"][:4]), at_most=1e-3),
        Criterion("1,000 positions, order 16: worst error", lambda f: max(f["order 16"]), at_least=0.3),
        Criterion("learned delays, squared error of the LMU", lambda f: f["LMU"], at_most=1e-3),
        Criterion("the same, over the LSTM's", lambda f: f["LMU"] / f["LSTM"], at_most=0.05),
    ],
)

if __name__ == "__main__":
    main(REPRODUCTION)
