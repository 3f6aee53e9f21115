"""Mamba's scan, forward and backward, beside position by position and the slow path of `transformers`.

Then its time and memory by length.

    python tools/benchmark/scan.py [--threads 1] [--seq 1024] [--longest 32768]

The peers keep every state for backward and take minutes from a few thousand positions on: each is run once. Memory is
what forward and backward hold at most, counted where torch makes tensors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moescale.ops.scan import selective_scan, selective_scan_reference
from tests.support.memory import Memory

CHANNELS, D_STATE = 256, 16


def make(seq: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    u, delta, b, c = (torch.randn(1, seq, size) for size in (CHANNELS, CHANNELS, D_STATE, D_STATE))
    a, d = -torch.arange(1.0, D_STATE + 1).expand(CHANNELS, D_STATE).clone(), torch.ones(CHANNELS)
    return tuple(x.requires_grad_() for x in (u, torch.nn.functional.softplus(delta - 4), a, b, c, d))


def slow_path(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor]:
    """Scan as `transformers` does without kernels."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return (mamba_selective_scan(u.mT, delta.mT, a, b.mT, c.mT, D=d).mT,)


def seconds(scan: Callable[..., tuple[Tensor, ...]], seq: int, rounds: int) -> tuple[float, Tensor]:
    """Time forward and backward. Returns the median, and the gradient of u."""
    taken = []
    for _ in range(rounds):
        inputs = make(seq)
        begin = time.perf_counter()
        scan(*inputs)[0].sum().backward()
        taken.append(time.perf_counter() - begin)
    assert inputs[0].grad is not None
    return statistics.median(taken), inputs[0].grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seq", type=int, default=1024, help="at which the peers are timed")
    parser.add_argument("--longest", type=int, default=32768)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console, table = Console(width=110), Table("scan", "seq", "forward and backward, ms", "over ours")
    ours, exact = seconds(selective_scan, arguments.seq, 5)
    table.add_row("ours", str(arguments.seq), f"{1000 * ours:.0f}", "")
    for name, scan in (("position by position", selective_scan_reference), ("transformers, slow path", slow_path)):
        theirs, grad = seconds(scan, arguments.seq, 1)
        torch.testing.assert_close(grad, exact, rtol=1e-3, atol=1e-3)
        table.add_row(name, str(arguments.seq), f"{1000 * theirs:.0f}", f"{theirs / ours:.0f}")
    console.print(table)
    table = Table("seq", "forward and backward, ms", "us a position", "most MB", "bytes a position and channel")
    seq = 1024
    while seq <= arguments.longest:
        taken, _ = seconds(selective_scan, seq, 3)
        with Memory() as memory:
            selective_scan(*make(seq))[0].sum().backward()
        table.add_row(str(seq), f"{1000 * taken:.0f}", f"{1e6 * taken / seq:.1f}", f"{memory.peak / 1e6:.1f}",
                      f"{memory.peak / seq / CHANNELS:.0f}")
        seq *= 2
    console.print(table)


if __name__ == "__main__":
    main()
