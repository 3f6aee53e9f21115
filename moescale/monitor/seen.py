"""Sees which experts each token gets, while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from moescale.engine.base import Choices, Engine
from moescale.moe.routers.base import top_k


@dataclass(frozen=True)
class Found:
    """What some tokens got, layer by layer, padding in the end.

    expert, weight: [layers, tokens, top_k], int16 with -1 = none, and float32, the best first. likely, probability:
    [layers, the first of the tokens, some experts], int16 and float16, those of the largest probabilities.
    """

    expert: np.ndarray
    weight: np.ndarray
    likely: np.ndarray
    probability: np.ndarray


class HeldOutRecorder:
    """Sees on every rank which experts some tokens of an evaluation get.

    group: all ranks, each with its device. num_layers: of the whole model. seq_len: tokens of a sequence. sequences:
    the numbers of those that are kept, evenly spaced from 0. likely: tokens, and how many experts of each are kept by
    probability.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, device: torch.device, *, num_layers: int, top_k: int, seq_len: int,
        sequences: range, likely: tuple[int, int] = (0, 0),
    ) -> None:
        self.group, self.device = group, device
        self.num_layers, self.top_k, self.seq_len = num_layers, top_k, seq_len
        self.sequences, self.likely = sequences, likely

    @contextmanager
    def recording(self, engine: Engine) -> Iterator[None]:
        """See an evaluation."""
        tokens = len(self.sequences) * self.seq_len
        self._found, self._likely = (
            torch.zeros(self.num_layers, number, 2 * experts, dtype=torch.float64, device=self.device)
            for number, experts in ((tokens, self.top_k), (min(tokens, self.likely[0]), self.likely[1])))
        with engine.record(training=False, choices=self._take):
            yield

    def _take(self, choices: Choices) -> None:
        """Write down those tokens that are kept, expert + 1 and weight; what is not here stays zero."""
        none_last = (choices.expert < 0).byte().argsort(dim=1, stable=True)[:, : self.top_k]
        both = torch.cat((choices.expert.gather(1, none_last) + 1, choices.weight.gather(1, none_last)), 1).double()
        sequence, position = choices.token_id.div(self.seq_len, rounding_mode="floor"), choices.token_id % self.seq_len
        step = self.sequences.step
        kept = (sequence >= 0) & (sequence < self.sequences.stop) & (sequence % step == 0)
        position += sequence // step * self.seq_len
        self._found[choices.layer, position[kept]] = both[kept]
        probability, expert = top_k(choices.probs, self.likely[1])
        kept &= position < self._likely.shape[1]
        self._likely[choices.layer, position[kept]] = torch.cat((expert + 1, probability), 1).double()[kept]

    def result(self, layers: Sequence[int]) -> Found | None:
        """Bring the ranks' parts together, in one collective. layers: those that are mixtures. -> on the first rank"""
        both = torch.cat((self._found.flatten(), self._likely.flatten()))
        if self.group is not None:
            dist.all_reduce(both, group=self.group)
            if dist.get_rank(self.group) != 0:
                return None
        found, likely = both.cpu().split((self._found.numel(), self._likely.numel()))
        expert, weight = found.view(self._found.shape)[list(layers)].chunk(2, -1)
        best, probability = likely.view(self._likely.shape)[list(layers)].chunk(2, -1)
        return Found((expert - 1).short().numpy(), weight.float().numpy(), (best - 1).short().numpy(),
                     probability.half().numpy())
