"""What sizes must fit that are made small for a proof on a laptop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Small:
    """The layouts that small sizes must fit, and the sequences.

    tps, eps, etps: degrees of all layouts. seq_len: as it was. small_seq_len: as it will be.
    """

    tps: tuple[int, ...]
    eps: tuple[int, ...]
    etps: tuple[int, ...]
    seq_len: int
    small_seq_len: int

    def length(self, length: int | None) -> int | None:
        """Make a stretch of a sequence small; one that is shorter than a sequence stays so."""
        if length is None or length >= self.seq_len:
            return None if length is None else self.small_seq_len
        return min(max(round(self.small_seq_len * length / self.seq_len), 3), self.small_seq_len - 1)


def smallest_divisor(number: int, least: int, good: Callable[[int], bool]) -> int:
    """Find the smallest divisor from `least` on that is good; the number itself is."""
    return next(n for n in range(least, number + 1) if number % n == 0 and good(n))


def smallest_multiple(least: int, divisors: Iterable[int]) -> int:
    """Find the smallest number from `least` on that all of these divide."""
    common = math.lcm(*divisors)
    return -(-least // common) * common
