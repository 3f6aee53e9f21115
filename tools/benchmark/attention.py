"""Attention forward and backward beside torch's with a mask: windows and documents, in alternation.

    python tools/benchmark/attention.py [--threads 2] [--rounds 8]

Prints medians in milliseconds and the ratio. What both give is compared first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from moescale.ops.attention import attention

CASES = [  # batch, seq, heads, kv_heads, head_dim, window, tokens a document
    (16, 64, 8, 2, 32, None, None), (16, 64, 8, 2, 32, None, 50), (8, 256, 8, 2, 32, None, None),
    (8, 256, 8, 2, 32, 128, None), (8, 256, 8, 2, 32, None, 100), (8, 256, 8, 2, 32, None, 250),
    (2, 1024, 8, 2, 64, None, None), (2, 1024, 8, 2, 64, 1000, None), (1, 2048, 8, 2, 64, None, None),
    (1, 2048, 8, 2, 64, 128, None), (1, 2048, 8, 2, 64, None, 400), (1, 4096, 8, 2, 64, 512, None),
]
BACKENDS: tuple[Literal["auto", "sdpa"], ...] = ("auto", "sdpa")


def run(backend: Literal["auto", "sdpa"], case: tuple, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """Time forward and backward. -> seconds, the gradient of the queries"""
    batch, seq, heads, kv_heads, head_dim, window, document = case
    torch.manual_seed(0)
    counts = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(batch, seq, count, head_dim, dtype=dtype, requires_grad=True) for count in counts)
    positions = (torch.arange(seq) % (document or seq)).expand(batch, -1)
    begin = time.perf_counter()
    out = attention(q, k, v, window=window, positions=positions, backend=backend)
    out.sum().backward()
    elapsed = time.perf_counter() - begin
    assert q.grad is not None
    return elapsed, q.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("batch x seq", "heads", "window", "document", "dtype", "auto, ms", "sdpa, ms", "ratio")
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs = run("auto", case, dtype)[1], run("sdpa", case, dtype)[1]
            torch.testing.assert_close(ours, theirs, atol=5e-2 if dtype == torch.bfloat16 else 1e-4, rtol=0)
            seconds: dict[str, list[float]] = {"auto": [], "sdpa": []}
            for number in range(arguments.rounds):
                for backend in BACKENDS if number % 2 else BACKENDS[::-1]:  # who comes second finds warmer caches
                    seconds[backend].append(run(backend, case, dtype)[0])
            auto, sdpa = (1000 * statistics.median(values) for values in seconds.values())
            table.add_row(f"{case[0]} x {case[1]}", f"{case[2]} on {case[3]}, {case[4]}", str(case[5] or ""),
                          str(case[6] or ""), str(dtype).removeprefix("torch."), f"{auto:.1f}", f"{sdpa:.1f}",
                          f"{sdpa / auto:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
