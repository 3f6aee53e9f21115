"""Share token windows out over ranks and micro-batches.

The order is a function of the seed and the sequence's number, so that a run may go on with another number of sequences
in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moescale.config import ConfigError
from moescale.data.blend import Blend
from moescale.data.split import TokenSplit
from moescale.errors import refuse

IGNORED = -100  # a target that no loss counts


@dataclass(frozen=True)
class Batch:
    """One micro-batch of packed documents.

    tokens: [batch, seq] int64. targets: [batch, seq] int64, -100 = ignored.
    positions: [batch, seq] int64, restart at 0 with each document.
    token_id: [batch, seq] int64, the token's number in the whole run, from which its random draws come; -1 = padding.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    token_id: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy to the device, without waiting for the copy."""
        parts = (self.tokens, self.targets, self.positions, self.token_id)
        return Batch(*(part.to(device, non_blocking=True) for part in parts))


@dataclass(frozen=True)
class Position:
    """How far into its data a run is after so many steps.

    sequences: of the order seen so far; the one with this number comes next. tokens: seen in all, by which token
    numbers go on when the length of a sequence or the order changes.
    """

    step: int = 0
    sequences: int = 0
    tokens: int = 0


START = Position()


class Batches:
    """The training sequences of every step, shared out over the batch ranks.

    The stream of tokens is cut into windows that overlap by the one token that is the last target. An epoch visits
    every window once, in an order drawn from the seed and the epoch; sequence numbers run on from epoch to epoch. Of a
    blend, each stream has its own epochs.
    Nothing is kept from step to step, so any step from the start on can be asked for, on any number of ranks.
    """

    def __init__(
        self, tokens: TokenSplit | Blend, *, seq_len: int, global_batch: int, seed: int, start: Position = START,
        batch_schedule: Sequence[tuple[int, int]] = (),
    ) -> None:
        """start: where a run stood when it went on with these settings. batch_schedule: steps, and sequences then."""
        self.blend = tokens if isinstance(tokens, Blend) else Blend((tokens,), ("",), (1.0,))
        self.seq_len, self.seed, self.start = seq_len, seed, start
        self.stretches = [(0, global_batch), *batch_schedule]
        self.num_windows = [num_windows(part, seq_len) for part in self.blend.parts]
        for part, name, windows in zip(self.blend.parts, self.blend.names, self.num_windows, strict=True):
            advice = (f"use data.seq_len={part.num_tokens - 1} or less, or more text" if part.num_tokens > 1
                      else "name more text in data.files")
            refuse(windows < 1, f"data.seq_len={seq_len} needs {seq_len + 1} tokens, but the training documents "
                   f"{f'of {name} ' if name else ''}hold {part.num_tokens}: {advice}")
        self._orders: dict[tuple[int, int], np.ndarray] = {}  # of the last epochs asked for, by part and epoch

    def position(self, step: int) -> Position:
        """Return where the run is after so many steps, none before the start."""
        sequences = 0
        for (begin, batch), (end, _) in pairwise([*self.stretches, (max(step, self.stretches[-1][0]), 0)]):
            sequences += max(0, min(step, end) - max(self.start.step, begin)) * batch
        return Position(step, self.start.sequences + sequences, self.start.tokens + sequences * self.seq_len)

    def epochs(self, step: int) -> float:
        """Return how often the text has been seen after so many steps, of a blend the one that was seen most often."""
        counts = self.blend.counts(self.position(step).sequences)
        return max(count / windows for count, windows in zip(counts, self.num_windows, strict=True))

    def micro_batches(self, step: int, rank: int, num_ranks: int, micro_batch: int) -> list[Batch]:
        """Give one batch rank its sequences of one optimizer step, in order.

        step: counted from 0, not before the start. rank: among the num_ranks that share the global batch.
        micro_batch: sequences a Batch.
        """
        assert 0 <= rank < num_ranks
        begin, end = self.position(step).sequences, self.position(step + 1).sequences
        assert (end - begin) % num_ranks == 0
        share = (end - begin) // num_ranks
        assert share % micro_batch == 0
        first = begin + rank * share
        return [_stack([self._sequence(number) for number in range(place, place + micro_batch)])
                for place in range(first, first + share, micro_batch)]

    def _sequence(self, number: int) -> np.ndarray:
        part, place = self.blend.place(number)
        epoch, within = divmod(place, self.num_windows[part])
        window = int(self._order(part, epoch)[within])
        sequence = _read(self.blend.parts[part], window * self.seq_len, self.seq_len, number)
        sequence[-1] += self.start.tokens - self.start.sequences * self.seq_len  # no number twice in a run
        return sequence

    def _order(self, part: int, epoch: int) -> np.ndarray:
        if (part, epoch) not in self._orders:
            kept = sorted(key for key in self._orders if key[0] == part)
            for key in kept[:-1]:  # a step may end one epoch and begin the next
                del self._orders[key]
            generator = np.random.default_rng(np.random.SeedSequence((self.seed, epoch, part)))
            self._orders[part, epoch] = generator.permutation(self.num_windows[part])
        return self._orders[part, epoch]


def num_windows(tokens: TokenSplit, seq_len: int) -> int:
    """Count the sequences of an epoch."""
    return (tokens.num_tokens - 1) // seq_len


def held_out_batches(
    tokens: TokenSplit, *, seq_len: int, num_sequences: int, rank: int, num_ranks: int, micro_batch: int
) -> list[Batch]:
    """Give one batch rank its part of the held-out sequences, the same ones on every number of ranks.

    Up to num_sequences windows, spread evenly. Every rank gets equally many Batches of one shape, filled up with
    padding. Raises ConfigError when there is nothing to predict.
    """
    if tokens.num_tokens < 2:
        raise ConfigError(f"the held-out documents hold {tokens.num_tokens} tokens, too few to evaluate on: "
                          "name more text in data.files")
    windows = held_out_windows(tokens, seq_len, num_sequences)
    passes = -(-len(windows) // (num_ranks * micro_batch))
    first = rank * passes * micro_batch
    return [_stack([_read(tokens, windows[number], seq_len, number) if number < len(windows)
                    else _padding(seq_len) for number in range(begin, begin + micro_batch)])
            for begin in range(first, first + passes * micro_batch, micro_batch)]


def held_out_windows(tokens: TokenSplit, seq_len: int, num_sequences: int) -> list[int]:
    """Spread the held-out sequences evenly, and give the place of each one's first token in the stream."""
    whole, rest = divmod(tokens.num_tokens - 1, seq_len)
    windows = whole if whole >= num_sequences else whole + (rest > 0)  # the partial last one only when needed
    count = min(num_sequences, windows)
    return [number * windows // count * seq_len for number in range(count)]


def _read(tokens: TokenSplit, start: int, seq_len: int, number: int) -> np.ndarray:
    """Read the window at `start` as sequence `number`, padded where the stream ends. -> [4, seq] int64"""
    length = min(seq_len, tokens.num_tokens - 1 - start)
    ids, positions = tokens.window(start, length + 1)
    sequence = _padding(seq_len)
    sequence[:, :length] = ids[:-1], ids[1:], positions[:-1], number * seq_len + np.arange(length)
    return sequence


def _padding(seq_len: int) -> np.ndarray:
    """Make an empty sequence: nothing to predict, each token a document of its own. -> [4, seq] int64"""
    return np.repeat(np.array([[0], [IGNORED], [0], [-1]], dtype=np.int64), seq_len, axis=1)


def _stack(sequences: list[np.ndarray]) -> Batch:
    parts = torch.from_numpy(np.stack(sequences, axis=1))  # [4, batch, seq]
    return Batch(*parts.unbind(0))
