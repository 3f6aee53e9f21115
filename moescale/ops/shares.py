"""Cuts rows sorted by expert into equal shares for a processor's threads, and these into blocks that fit the cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
BLOCK_NUMBERS = 1 << 20  # numbers that the blocks of all threads have together, at their widest
SLICE_NUMBERS = 1 << 17  # numbers of the rows of a block that are activated together
MOST_SHARES = 16  # of one compiled call, each on a thread and with a sum over all tokens
FEWEST_ROWS = 16  # of each
# Without compiled calls products have threads of their own, beside those of Python that take the shares:
MOST_THREADS = 4
FEWEST_ROWS_IN_STEPS = 4096  # of each; of fewer, products on all threads take less time
LARGEST_IN_STEPS = 1 << 26  # multiplications per expert beyond which they do, too


class RowBlock(NamedTuple):
    """Some rows of one expert, counted from the beginning of their share.

    length: size rounded up, with some of the rows behind. first: whether it is the expert's first block in this share.
    borrowed: whether the expert begins in another share, whose thread holds the gradients of its matrices.
    """

    expert: int
    start: int
    size: int
    length: int
    first: bool
    borrowed: bool

    @property
    def rows(self) -> slice:
        """The rows of the block within its share."""
        return slice(self.start, self.start + self.size)

    @property
    def rounded_rows(self) -> slice:
        """The same, with those behind up to `length`."""
        return slice(self.start, self.start + self.length)


class Share(NamedTuple):
    """The rows that one thread takes, of consecutive experts, and the blocks that it cuts them into."""

    rows: slice
    blocks: list[RowBlock]

    @property
    def table(self) -> torch.Tensor:
        """The blocks as compiled functions read them. -> [blocks, 6] int64, the fields of each"""
        return torch.tensor(self.blocks, dtype=torch.int64, device="cpu")

    @property
    def longest(self) -> int:
        """The length of the longest block, in rows."""
        return max(block.length for block in self.blocks)

    @property
    def length(self) -> int:
        """Rows that its blocks reach, rounded up."""
        return max(block.rounded_rows.stop for block in self.blocks)


def cut(sizes: list[int], d_model: int, d_ff: int, *, round_up: bool, compiled: bool) -> list[Share]:
    """Share the rows among threads, and cut each expert's into equal blocks that fit the cache.

    sizes: rows of each expert; one without rows has an empty block. round_up: round block lengths up to few sizes, and
    not only to even ones. compiled: whether a thread computes its share without Python.
    """
    # How many threads, and where their shares begin: next to the end of an expert, when one is near.
    total, ends = sum(sizes), list(accumulate(sizes))
    most, fewest = (MOST_SHARES, FEWEST_ROWS) if compiled else (MOST_THREADS, FEWEST_ROWS_IN_STEPS)
    threads = max(1, min(torch.get_num_threads(), most, total // fewest))
    if not compiled and total // len(sizes) * d_model * d_ff > LARGEST_IN_STEPS:
        threads = 1
    cuts = [0]
    for number in range(1, threads):
        cuts.append(_nearest_end(total * number // threads, ends, total // threads // 16))
    cuts.append(total)
    shares = [Share(slice(begin, end), []) for begin, end in pairwise(cuts)]
    # Each expert's rows in each share, cut into equal blocks.
    most = max(256, BLOCK_NUMBERS // threads // max(d_model, d_ff))  # rows of a block
    for expert, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        if size == 0:
            shares[0].blocks.append(RowBlock(expert, 0, 0, 0, first=True, borrowed=False))
            continue
        for rows, blocks in shares:
            start, stop = max(end - size, rows.start), min(end, rows.stop)
            count = max(0, -(-(stop - start) // most))
            for number in range(count):
                low = start + (stop - start) * number // count
                high = start + (stop - start) * (number + 1) // count
                length = _rounded(high - low) if round_up else (high - low + 1) // 2 * 2
                blocks.append(RowBlock(expert, low - rows.start, high - low, length, first=number == 0,
                                    borrowed=end - size < rows.start))
    return shares


def _nearest_end(row: int, ends: list[int], most: int) -> int:
    """Find the nearest end of an expert; the row itself when that is more than `most` rows away."""
    end = min(ends, key=lambda end: abs(end - row))
    return end if abs(end - row) <= most else row


def run_on_threads(run: Callable[..., None], *arguments: Iterable[Any]) -> None:
    """Call `run` once per share, each on a thread of its own, with its element of each of the arguments.

    Small products on several threads at once keep cores busier than one after another on all of them.
    """
    calls, threads = list(zip(*arguments, strict=True)), torch.get_num_threads()
    if len(calls) == 1:
        run(*calls[0])
        return

    def run_one(call: tuple[Any, ...]) -> None:
        torch.set_num_threads(threads // len(calls))  # of this thread, and of all threads' products
        with torch.no_grad():
            run(*call)

    try:
        _call_each(_pool(), run_one, calls)
    finally:
        torch.set_num_threads(threads)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_THREADS - 1, "experts")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay behind


def _call_each(pool: ThreadPoolExecutor, run: Callable[[T], None], arguments: Sequence[T]) -> None:
    """Call `run` with each of the arguments, with the first on this thread; wait for all, whatever one raises."""
    others = [pool.submit(run, argument) for argument in arguments[1:]]
    try:
        run(arguments[0])
    finally:
        wait(others)
    for other in others:
        other.result()


def slice_rows(features: int) -> int:
    """Count the rows that steps without a product take at a time."""
    return max(1, SLICE_NUMBERS // features)


def _rounded(size: int) -> int:
    """Round up to one of thirty-two sizes an octave, and to 16 at least."""
    unit = max(16, 1 << max(0, size.bit_length() - 6))
    return -(-size // unit) * unit
