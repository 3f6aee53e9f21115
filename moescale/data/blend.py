"""Several texts in one training run, each with its share of the sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from moescale.data.split import TokenSplit


@dataclass(frozen=True, eq=False)
class Blend:
    """Streams of tokens that sequences are taken from in turn, so that any run of them has the shares of `weights`.

    names: what the configuration calls each. weights: positive.

    The k-th sequence of a stream is due at (k + 1/2) / weight, and they come in the order in which they are due. So
    after n sequences each stream has given its share of n, to within a few, and to find the stream of sequence n takes
    no counting from the beginning.
    """

    parts: tuple[TokenSplit, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def shares(self) -> list[float]:
        """Return what part of the sequences comes from each stream."""
        return [weight / sum(self.weights) for weight in self.weights]

    def counts(self, number: int) -> list[int]:
        """Count what each stream has given of the first `number` sequences."""
        shares = self.shares
        behind = max(0, number - len(shares))  # when fewer were due than that, by less than one a stream
        counts = [floor(behind * share + 0.5) for share in shares]
        for _ in range(number - sum(counts)):
            counts[_next(counts, shares)] += 1
        return counts

    def place(self, number: int) -> tuple[int, int]:
        """Find which stream a sequence comes from, and how many that has given before."""
        counts = self.counts(number)
        part = _next(counts, self.shares)
        return part, counts[part]


def _next(counts: Sequence[int], shares: Sequence[float]) -> int:
    """Choose the stream whose next sequence is due first."""
    return min(range(len(counts)), key=lambda part: (counts[part] + 0.5) / shares[part])
