"""Sees which experts each token gets, while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moescale.moe.layer import MoELayer
from moescale.moe.routers.base import top_k
from moescale.monitor.routing_metrics import layers


@dataclass(frozen=True)
class Seen:
    """What one layer's router decided about own tokens in one pass.

    layer: the block's index. token_id: [tokens] int64, -1 = padding. expert: [tokens, choices] int64, -1 = none.
    weight: [tokens, choices] float32. probs: [tokens, experts] float32, the router's probabilities.
    """

    layer: int
    token_id: Tensor
    expert: Tensor
    weight: Tensor
    probs: Tensor


@contextmanager
def recording(model: nn.Module, take: Callable[[Seen], None], *, training: bool) -> Iterator[None]:
    """Show each pass of each router to `take`, what recompute runs again left out.

    training: passes that have a backward; otherwise those of evaluation.
    """
    watched = layers(model)
    looks = [layer.router.look for _, layer in watched]  # the statistics', or those of another recording
    hooks = [layer.router.register_forward_hook(_hook(index, layer, take, training)) for index, layer in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for (_, layer), look in zip(watched, looks, strict=True):
            layer.router.look = look


def _hook(index: int, layer: MoELayer, take: Callable[[Seen], None], training: bool) -> Callable[..., None]:
    latest: list[Tensor] = []
    others = layer.router.look

    def look(probs: Tensor, valid: Tensor) -> None:
        latest[:] = [probs.detach().flatten(0, 1)]
        if others is not None:
            others(probs, valid)

    def see(router: nn.Module, inputs: tuple[Tensor, Tensor], outputs: Any) -> None:
        if layer.statistics.counting and router.training == training == torch.is_grad_enabled():
            routing = outputs[0]
            none = routing.row < 0
            row = routing.row.clamp(min=0)
            expert, weight = routing.expert, routing.weight.detach()
            if not len(expert):  # no token here has any
                expert, weight = expert.new_zeros(1), weight.new_zeros(1)
            token_id = layer.router.sequence.own(inputs[1]).flatten()
            expert, weight = expert[row].masked_fill(none, -1), weight[row].masked_fill(none, 0)
            take(Seen(index, token_id, expert, weight, latest.pop()))

    layer.router.look = look
    return see


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

    group: all ranks. num_layers: of the whole model. seq_len: tokens of a sequence. sequences: the numbers of those
    that are kept, evenly spaced from 0. likely: tokens, and how many experts of each are kept by probability.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, *, num_layers: int, top_k: int, seq_len: int, sequences: range,
        likely: tuple[int, int] = (0, 0),
    ) -> None:
        self.group, self.num_layers, self.top_k, self.seq_len = group, num_layers, top_k, seq_len
        self.sequences, self.likely = sequences, likely

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """See an evaluation."""
        device = next(model.parameters()).device
        tokens = len(self.sequences) * self.seq_len
        self._found, self._likely = (
            torch.zeros(self.num_layers, number, 2 * experts, dtype=torch.float64, device=device)
            for number, experts in ((tokens, self.top_k), (min(tokens, self.likely[0]), self.likely[1])))
        with recording(model, self._take, training=False):
            yield

    def _take(self, seen: Seen) -> None:
        """Write down those tokens that are kept, expert + 1 and weight; what is not here stays zero."""
        none_last = (seen.expert < 0).byte().argsort(dim=1, stable=True)[:, : self.top_k]
        both = torch.cat((seen.expert.gather(1, none_last) + 1, seen.weight.gather(1, none_last)), 1).double()
        sequence, place = seen.token_id.div(self.seq_len, rounding_mode="floor"), seen.token_id % self.seq_len
        step = self.sequences.step
        kept = (sequence >= 0) & (sequence < self.sequences.stop) & (sequence % step == 0)
        place += sequence // step * self.seq_len
        self._found[seen.layer, place[kept]] = both[kept]
        probability, expert = top_k(seen.probs, self.likely[1])
        kept &= place < self._likely.shape[1]
        self._likely[seen.layer, place[kept]] = torch.cat((expert + 1, probability), 1).double()[kept]

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
