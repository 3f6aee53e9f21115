"""Share token windows out over ranks and micro-batches; the order depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moescale.config import ConfigError
from moescale.data.token_file import TokenSplit


@dataclass(frozen=True)
class Batch:
    """One micro-batch of packed documents.

    tokens: [batch, seq] int64. targets: [batch, seq] int64, -100 = ignored.
    positions: [batch, seq] int64, restart at 0 with each document.
    serial: [batch, seq] int64, the token's number in the whole run, from which its random draws come; -1 = padding.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    serial: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy to the device, without waiting for the copy."""
        parts = (self.tokens, self.targets, self.positions, self.serial)
        return Batch(*(part.to(device, non_blocking=True) for part in parts))


class Batches:
    """The training windows in their order. Sequence number n of the run is the same on any number of ranks."""

    def __init__(self, tokens: TokenSplit, *, seq_len: int, global_batch: int, seed: int) -> None:
        """global_batch: sequences a step. Raises ConfigError when the data is shorter than one sequence."""
        self.num_windows = (tokens.num_tokens - 1) // seq_len  # each needs one token more, for its last target
        if self.num_windows < 1:
            raise ConfigError(f"data.seq_len={seq_len} is beyond the {tokens.num_tokens} training tokens: write "
                              f"data.seq_len={max(1, tokens.num_tokens - 1)} or less, or give more data.files")
        self._tokens, self._seq_len, self._global_batch, self._seed = tokens, seq_len, global_batch, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))  # the epoch and its permutation

    def micro_batches(self, step: int, rank: int, num_ranks: int, micro_batch: int) -> list[Batch]:
        """Make this rank's share of a step: the rank's contiguous part of the global batch, cut in order.

        step: from 0. rank, num_ranks: among those that share out the batch. micro_batch: sequences a pass.
        """
        share = self._global_batch // num_ranks
        first = step * self._global_batch + rank * share
        numbers = range(first, first + share)
        return [self._batch(numbers[at : at + micro_batch]) for at in range(0, share, micro_batch)]

    def _batch(self, numbers: range) -> Batch:
        windows = [self._tokens.window(self._window(number) * self._seq_len, self._seq_len + 1) for number in numbers]
        serial = [number * self._seq_len + np.arange(self._seq_len) for number in numbers]
        return _stack([tokens for tokens, _ in windows], [positions for _, positions in windows], serial)

    def _window(self, number: int) -> int:
        """Which window is the run's sequence `number`."""
        epoch, index = divmod(number, self.num_windows)
        if self._order[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._order = (epoch, generator.permutation(self.num_windows))
        return int(self._order[1][index])


def held_out_batches(
    tokens: TokenSplit, *, seq_len: int, num_sequences: int, rank: int, num_ranks: int, micro_batch: int
) -> list[Batch]:
    """Cut windows evenly over the held-out text, the same in every layout.

    num_sequences: at most that many. Every rank gets as many batches of the same shape, filled up with padding.
    """
    num_windows = max(1, -(-(tokens.num_tokens - 1) // seq_len))  # the last one may be short
    count = min(num_sequences, num_windows)
    chosen = [index * num_windows // count for index in range(count)]
    passes = -(-count // (num_ranks * micro_batch))
    mine = range(rank * passes * micro_batch, (rank + 1) * passes * micro_batch)
    rows = [_padded_window(tokens, chosen[i] * seq_len if i < count else None, seq_len, i) for i in mine]
    return [
        _stack(*zip(*rows[at : at + micro_batch], strict=True))
        for at in range(0, len(rows), micro_batch)
    ]


def _padded_window(
    tokens: TokenSplit, start: int | None, seq_len: int, number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> tokens, positions: [seq_len + 1] int64; serial: [seq_len] int64. Without a start, all of it is padding."""
    length = 0 if start is None else min(seq_len + 1, tokens.num_tokens - start)
    missing = seq_len + 1 - length
    ids, positions = tokens.window(start or 0, length)
    serial = np.arange(seq_len) + number * seq_len
    serial[max(0, length - 1) :] = -1
    return np.pad(ids, (0, missing)), np.pad(positions, (0, missing)), serial


def _stack(tokens: Sequence[np.ndarray], positions: Sequence[np.ndarray], serial: Sequence[np.ndarray]) -> Batch:
    """tokens, positions: rows of [seq + 1]. serial: rows of [seq]; where it is -1 the target is ignored."""
    ids, order = torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(serial))
    targets = ids[:, 1:].masked_fill(order < 0, -100)
    return Batch(ids[:, :-1].contiguous(), targets, torch.from_numpy(np.stack(positions))[:, :-1].contiguous(), order)
