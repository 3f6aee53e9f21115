"""Mamba's scan, forward and backward, beside position by position and the slow path of `transformers`.

Then its time and memory by length. With one thread, time is that in which it computes: other work counts for less.

    python tools/benchmark/scan.py [--threads 2] [--channels 64] [--seq 2048 4096] [--longest 32768]

The slow path's backward makes a gradient of the whole length for each position and takes minutes: it is run once a
length. Memory is what forward and backward hold at most, counted where torch makes tensors.
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

D_STATE = 16


def make(seq: int, channels: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    u, delta, b, c = (torch.randn(1, seq, size) for size in (channels, channels, D_STATE, D_STATE))
    a, d = -torch.arange(1.0, D_STATE + 1).expand(channels, D_STATE).clone(), torch.ones(channels)
    return tuple(x.requires_grad_() for x in (u, torch.nn.functional.softplus(delta - 4), a, b, c, d))


def slow_path(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor]:
    """Scan as `transformers` does without kernels."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return (mamba_selective_scan(u.mT, delta.mT, a, b.mT, c.mT, D=d).mT,)


def seconds(scan: Callable[..., tuple[Tensor, ...]], seq: int, channels: int, rounds: int) -> tuple[float, Tensor]:
    """Time forward and backward. Returns the median, and the gradient of u."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken = []
    for _ in range(rounds):
        inputs = make(seq, channels)
        begin = clock()
        y = scan(*inputs)[0]
        y.backward(torch.ones_like(y))  # not of a sum, whose gradient is one number in memory
        taken.append(clock() - begin)
    assert inputs[0].grad is not None
    return statistics.median(taken), inputs[0].grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--seq", type=int, nargs="*", default=[2048, 4096], help="at which the peers are timed")
    parser.add_argument("--longest", type=int, default=32768)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    channels, console = arguments.channels, Console(width=110)
    table = Table("scan", "seq", "forward and backward, ms", "over ours")
    for seq in arguments.seq:
        ours, exact = seconds(selective_scan, seq, channels, 5)
        table.add_row("ours", f"{seq:,}", f"{1000 * ours:.0f}", "")
        for name, scan, rounds in (("position by position", selective_scan_reference, 3),
                                   ("transformers, slow path", slow_path, 1)):
            theirs, grad = seconds(scan, seq, channels, rounds)
            torch.testing.assert_close(grad, exact, rtol=1e-3, atol=1e-3)
            table.add_row(name, f"{seq:,}", f"{1000 * theirs:.0f}", f"{theirs / ours:.0f}")
    console.print(table)
    table = Table("seq", "forward and backward, ms", "us a position", "most MB", "bytes a position and channel")
    seq = 1024
    while seq <= arguments.longest:
        taken, _ = seconds(selective_scan, seq, channels, 3)
        with Memory() as memory:
            selective_scan(*make(seq, channels))[0].sum().backward()
        table.add_row(f"{seq:,}", f"{1000 * taken:.0f}", f"{1e6 * taken / seq:.1f}", f"{memory.peak / 1e6:.1f}",
                      f"{memory.peak / seq / channels:.0f}")
        seq *= 2
    console.print(table)


if __name__ == "__main__":
    main()
