"""Time and memory of every recurrent mixer by the length of a sequence, forward and backward.

    python tools/benchmark/mixers.py [--threads 2] [--rounds 3] [--longest 32768] [--only s4,lssl]

One layer of 64 features with the mixer's own defaults, one sequence that is one document. Times are medians of rounds
in which all lengths take turns. Memory is what forward and backward hold at most, counted where torch makes tensors.
The slope is that of the logarithm over the logarithm of the length, fitted to all lengths: 1 is linear. One thread is
timed by the processor's clock, to which other programs add nothing; several by the wall's.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from moescale.config import parse_config
from moescale.model.build import build_model
from moescale.model.initialize import initialize
from moescale.spec.model import describe
from tests.support.memory import Memory

D_MODEL, SHORTEST = 64, 2048
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "s4": {"s4": {}},
    "s4 diagonal": {"s4": {"form": "diagonal", "discretization": "zero_order_hold"}},
    "lssl": {"lssl": {}},
    "hippo": {"hippo": {}},
    "hippo legt": {"hippo": {"measure": "legt", "theta": 256.0}},
    "lmu": {"lmu": {}},
    "mamba": {"mamba": {}},
    "mamba2": {"mamba2": {"head_dim": 16}},
    "linear_attention": {"linear_attention": {}},
}


def make(keys: dict[str, dict[str, Any]]) -> nn.Module:
    """Make a mixer as a run begins with it."""
    (kind,) = keys
    config = parse_config({
        **keys, "model": {"d_model": D_MODEL, "num_layers": 1,
                          "pattern": [{"mixer": kind, "channel_mixer": "feed_forward"}]}}, "benchmark")
    model = build_model(config, "cpu")
    initialize(model, describe(config), 0)
    mixer = model.blocks["0"].mixer
    assert isinstance(mixer, nn.Module)
    return mixer


def run(mixer: nn.Module, length: int) -> float:
    """Go forward and backward over one sequence. Returns seconds."""
    torch.manual_seed(0)
    x = torch.randn(1, length, D_MODEL, requires_grad=True)
    positions = torch.arange(length).unsqueeze(0)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    mixer(x, positions).square().sum().backward()
    return clock() - began


def slope(lengths: list[int], values: list[float]) -> float:
    """Fit a line to the logarithms."""
    x, y = [math.log(each) for each in lengths], [math.log(each) for each in values]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--only", default=",".join(KINDS), help="mixers, with commas between")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths = [SHORTEST << power for power in range((arguments.longest // SHORTEST).bit_length())]
    columns = [f"{length:,}" for length in lengths]
    times = Table("forward and backward, ms", *columns, "slope")
    memory = Table("most held, MB", *columns, "slope")
    for name in arguments.only.split(","):
        mixer = make(KINDS[name])
        run(mixer, SHORTEST)
        rounds = [[run(mixer, length) for length in lengths] for _ in range(arguments.rounds)]
        taken = [1000 * statistics.median(each) for each in zip(*rounds, strict=True)]
        held = []
        for length in lengths:
            with Memory() as counted:
                run(mixer, length)
            held.append(counted.peak / 1e6)
        times.add_row(name, *(f"{each:.0f}" for each in taken), f"{slope(lengths, taken):.2f}")
        memory.add_row(name, *(f"{each:.1f}" for each in held), f"{slope(lengths, held):.2f}")
    console = Console(width=110)
    console.print(times)
    console.print(memory)


if __name__ == "__main__":
    main()
