"""S4: a kernel from its spectrum, eigenvalues that remember from the start, generation in constant time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from digits import digits
from frame import Criterion, Figures, Reproduction, main
from torch import Tensor, nn

from moescale.layers.norm import LayerNorm
from moescale.mixers.attention import Attention
from moescale.mixers.state_space import DiagonalSystems, DplrSystems, StateSpace, Systems
from moescale.ops.s4 import (
    diagonal_eigenvalues,
    discretize_dplr,
    dplr_kernel,
    dplr_kernel_reference,
    dplr_legs,
    first_values,
)

D_STATE, CHANNELS, HELD, EPOCHS, BATCH = 64, 32, 16, 9, 50


def kernel_errors(seed: int) -> Figures:
    """Compare the kernel of the Cauchy sums with the power series, tap by tap."""
    figures: Figures = {}
    eigenvalues, p, b = (x.unsqueeze(0) for x in dplr_legs(D_STATE))
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(1, 1, D_STATE // 2, dtype=torch.complex128, generator=generator)
    for length in (1024, 16384):
        for kind in (torch.complex128, torch.complex64):
            step = torch.tensor([1e-3], dtype=kind.to_real())
            ours = (eigenvalues.to(kind), p.to(kind), b.to(kind), c.to(kind), step)
            kernel = dplr_kernel(*ours, length, discretize_dplr(*ours)[0])
            exact = dplr_kernel_reference(eigenvalues, p, b, c, step.double(), length)
            figures[f"error {kind.itemsize} {length}"] = float((kernel - exact).norm() / exact.norm())
    return figures


class Classifier(nn.Module):
    """Two layers of S4D on one number a position, and a class from the mean over positions."""

    def __init__(self, eigenvalues: Tensor) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, CHANNELS), nn.Linear(CHANNELS, 10)
        self.norms = [LayerNorm(CHANNELS, 1e-5) for _ in range(2)]
        self.mixers = [
            StateSpace(CHANNELS, 1, start(DiagonalSystems(CHANNELS, D_STATE, "zero_order_hold"), eigenvalues),
                       gated=True)
            for _ in range(2)]
        self.layers = nn.ModuleList([*self.norms, *self.mixers])
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            nn.init.ones_(norm.weight)
            nn.init.normal_(mixer.out.weight, std=CHANNELS**-0.5)

    def forward(self, signal: Tensor) -> Tensor:
        positions = torch.arange(signal.shape[1]).expand(len(signal), -1)
        x = self.embed(signal.unsqueeze(2))
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x), positions)
        return self.head(x.mean(1))


@torch.no_grad()
def start(systems: DiagonalSystems | DplrSystems, eigenvalues: Tensor) -> Systems:
    """Fill systems as a run's S4 begins, from these eigenvalues [d_state / 2]."""
    systems.log_decay.copy_((-eigenvalues.real).log())
    systems.frequency.copy_(eigenvalues.imag)
    systems.b.copy_(first_values("b" if isinstance(systems, DplrSystems) else "one", D_STATE))
    if isinstance(systems, DplrSystems):
        systems.p.copy_(first_values("p", D_STATE))
    systems.c.normal_(std=0.5**0.5)
    systems.d.normal_()
    systems.log_step.uniform_(np.log(1e-3), np.log(1e-1))
    return systems


def learned(seed: int, initialization: str) -> list[float]:
    """Train on permuted digits, each pixel held for some positions. Returns the test accuracy after each epoch."""
    torch.manual_seed(seed)
    images, labels, test_images, test_labels = digits(seed)
    order = torch.randperm(images.shape[1])
    signals, test_signals = (x[:, order].repeat_interleave(HELD, 1) for x in (images, test_images))
    eigenvalues = diagonal_eigenvalues("lin", D_STATE)
    if initialization == "random":
        eigenvalues = torch.complex(-torch.randn(D_STATE // 2).abs(), torch.randn(D_STATE // 2))
    model = Classifier(eigenvalues)
    optimizer, accuracies = torch.optim.Adam(model.parameters(), lr=4e-3), []
    for _ in range(EPOCHS):
        for some in torch.randperm(len(signals)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(signals[some]), labels[some]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracies.append(float((model(test_signals).argmax(1) == test_labels).double().mean()))
    return accuracies


def generation(seed: int) -> Figures:
    """Time one more token behind 256 and 4,096 others: S4's step, and attention without a cache."""
    torch.manual_seed(seed)
    features, contexts = 64, (256, 4096)
    mixer = StateSpace(features, 1, start(DplrSystems(features, D_STATE), dplr_legs(D_STATE)[0]), gated=True)
    attention = Attention(features, 4, 4, 16, rope_theta=10000.0)
    for matrix in (mixer.out, attention.q, attention.k, attention.v, attention.o):
        nn.init.normal_(matrix.weight, std=features**-0.5)
    x, positions = torch.randn(1, contexts[-1] + 1, features), torch.arange(contexts[-1] + 1).unsqueeze(0)
    figures: Figures = {}
    with torch.no_grad():
        whole = mixer(x, positions)
        for context in contexts:
            state, last = mixer.new_state(1, context + 1), slice(context, context + 1)
            mixer(x[:, :context], positions[:, :context], state)
            out = mixer(x[:, last], positions[:, last], state)
            figures[f"difference {context}"] = float((out - whole[:, last]).abs().max())
            figures[f"s4 {context}"] = seconds(200, mixer, x[:, last], positions[:, last], state)
            figures[f"attention {context}"] = seconds(8, attention, x[:, : context + 1], positions[:, : context + 1])
    return figures


def seconds(times: int, mixer: nn.Module, *arguments: Any) -> float:
    """Call a mixer so many times. Returns the median time of the processor, to which other programs add nothing."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        mixer(*arguments)
        taken.append(time.process_time() - began)
    return sorted(taken)[times // 2]


def run(seed: int) -> Figures:
    return {**kernel_errors(seed), **generation(seed),
            "lin": learned(seed, "lin"), "random": learned(seed, "random")}


def plot(figure: Any, runs: Sequence[Figures]) -> None:
    left, right = figure.subplots(1, 2)
    for name, color in (("lin", "tab:blue"), ("random", "tab:gray")):
        for index, figures in enumerate(runs):
            left.plot(range(1, EPOCHS + 1), figures[name], color=color, label=f"S4D, {name}" if index == 0 else None)
    left.set(xlabel="epoch", ylabel="test accuracy", title="permuted digits, 1,024 positions")
    left.legend()
    for name in ("s4", "attention"):
        right.plot([256, 4096], [1000 * np.median([figures[f"{name} {context}"] for figures in runs])
                                 for context in (256, 4096)], marker="o", label=name)
    right.set(xscale="log", yscale="log", xlabel="tokens before", ylabel="ms for one more", title="generation")
    right.legend()


REPRODUCTION = Reproduction(
    title="S4 and S4D",
    paper="Gu, Goel, Re, 2022; Gu, Gupta, Goel, Re, 2022",
    claim="structured state spaces solve Path-X (88 %, later 96 %; all before at chance), HiPPO's initialization is "
          "worth more than 15 points on sequential CIFAR, and generation is 60 times faster than a Transformer's",
    miniature="the kernel of 64 states by Cauchy sums against the power series; permuted 8x8 digits with each pixel "
              "held 16 steps (1,024 positions), two S4D layers of 32 channels, Adam 4e-3, 9 epochs, S4D-Lin against "
              "random eigenvalues; one more token behind 256 and 4,096",
    run=run,
    plot=plot,
    criteria=(
        *(Criterion(f"relative error of {length:,} taps, {kind}", itemgetter(f"error {size} {length}"), at_most=bound)
          for kind, size, bound in (("complex128", 16, 1e-9), ("complex64", 8, 1e-3)) for length in (1024, 16384)),
        Criterion("test accuracy of S4D-Lin", lambda figures: figures["lin"][-1], at_least=0.70),
        Criterion("S4D-Lin's accuracy minus that of random eigenvalues",
                  lambda figures: figures["lin"][-1] - figures["random"][-1], at_least=0.25),
        Criterion("time of S4's step behind 4,096 tokens over behind 256",
                  lambda figures: figures["s4 4096"] / figures["s4 256"], at_most=1.3),
        Criterion("the same of attention without a cache",
                  lambda figures: figures["attention 4096"] / figures["attention 256"], at_least=5.0),
        Criterion("difference of a step's output from the convolution's",
                  lambda figures: max(figures["difference 256"], figures["difference 4096"]), at_most=1e-4),
    ),
)

if __name__ == "__main__":
    main(REPRODUCTION)
