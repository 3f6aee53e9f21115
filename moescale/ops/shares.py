"""Rows sorted by expert, shared among a processor's threads and cut into blocks that the cache holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

BLOCK_NUMBERS = 1 << 20  # of the widest features of all threads' blocks
SLICE_NUMBERS = 1 << 17  # of those of a block's rows that are activated together
MOST_THREADS = 4  # each sums over all tokens for itself
FEWEST_ROWS = 4096  # of a thread; with fewer, threads wait for each other's steps in Python
LARGEST_PRODUCT = 1 << 26  # multiplications of an expert's rows beyond which one product keeps all cores busy


class Block(NamedTuple):
    """Rows of one expert, counted from where their thread's begin. length: with some of those behind, rounded up.

    first: of the expert in this thread. borrowed: another thread writes the gradients of the expert's weights.
    """

    expert: int
    start: int
    size: int
    length: int
    first: bool
    borrowed: bool

    @property
    def own(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def rounded(self) -> slice:
        return slice(self.start, self.start + self.length)

    def slices(self, features: int) -> Iterator[tuple[slice, slice]]:
        """Its own rows, a few at a time: where they lie within the block, and among its thread's."""
        for begin in range(0, self.size, slice_rows(features)):
            end = min(begin + slice_rows(features), self.size)
            yield slice(begin, end), slice(self.start + begin, self.start + end)


class Share(NamedTuple):
    """The rows that one thread takes, of experts side by side."""

    rows: slice
    blocks: list[Block]

    @property
    def longest(self) -> int:
        return max(block.length for block in self.blocks)

    @property
    def length(self) -> int:
        return max(block.rounded.stop for block in self.blocks)


def cut(sizes: list[int], d_model: int, d_ff: int, round_up: bool) -> list[Share]:
    """Share the rows among threads, and cut each expert's into equal blocks that the cache holds.

    An expert without rows has an empty block. round_up: multiply some more rows than a block has, of few sizes.
    """
    total, ends = sum(sizes), list(accumulate(sizes))
    threads = max(1, min(torch.get_num_threads(), MOST_THREADS, total // FEWEST_ROWS))
    if total // len(sizes) * d_model * d_ff > LARGEST_PRODUCT:
        threads = 1
    most = max(256, BLOCK_NUMBERS // threads // max(d_model, d_ff))
    cuts = [0, *(_near(total * number // threads, ends, total // threads // 16) for number in range(1, threads)), total]
    shares = [Share(slice(*ends_of_share), []) for ends_of_share in pairwise(cuts)]
    for expert, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        if size == 0:
            shares[0].blocks.append(Block(expert, 0, 0, 0, first=True, borrowed=False))
            continue
        for rows, blocks in shares:
            start, stop = max(end - size, rows.start), min(end, rows.stop)
            pieces = max(0, -(-(stop - start) // most))
            for piece in range(pieces):
                low, high = (start + (stop - start) * edge // pieces for edge in (piece, piece + 1))
                length = _rounded(high - low) if round_up else high - low
                blocks.append(Block(expert, low - rows.start, high - low, length, first=piece == 0,
                                    borrowed=end - size < rows.start))
    return shares


def _near(row: int, ends: list[int], most: int) -> int:
    """-> where an expert ends, if that is not far, else the row itself"""
    end = min(ends, key=lambda end: abs(end - row))
    return end if abs(end - row) <= most else row


def on_threads(take: Callable[..., None], *of_shares: Iterable[Any]) -> None:
    """Let a thread take each share: small products beside each other keep cores busier than one by one on all."""
    calls, threads = list(zip(*of_shares, strict=True)), torch.get_num_threads()
    if len(calls) == 1:
        take(*calls[0])
        return

    def alone(call: tuple[Any, ...]) -> None:
        torch.set_num_threads(threads // len(calls))  # of this thread, and of all threads' products
        with torch.no_grad():
            take(*call)

    others = [_pool().submit(alone, call) for call in calls[1:]]
    try:
        alone(calls[0])
    finally:
        wait(others)
        torch.set_num_threads(threads)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_THREADS - 1, "experts")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay behind


def slice_rows(features: int) -> int:
    """-> rows that steps which need no product take at a time"""
    return max(1, SLICE_NUMBERS // features)


def _rounded(size: int) -> int:
    """Round up to one of sixteen sizes an octave, and to 32 at least."""
    unit = max(32, 1 << max(0, size.bit_length() - 5))
    return -(-size // unit) * unit
