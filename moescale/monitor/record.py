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
from moescale.monitor.routing import layers


@dataclass(frozen=True)
class Seen:
    """What one layer's router decided about own tokens in one pass.

    layer: the block's index. serial: [tokens] int64, -1 = padding. expert: [tokens, choices] int64, -1 = none.
    weight: [tokens, choices] float32.
    """

    layer: int
    serial: Tensor
    expert: Tensor
    weight: Tensor


@contextmanager
def recording(model: nn.Module, take: Callable[[Seen], None], *, training: bool) -> Iterator[None]:
    """Show each pass of each router to `take`, what recompute runs again left out.

    training: passes that have a backward; otherwise those of evaluation.
    """
    hooks = [layer.router.register_forward_hook(_hook(index, layer, take, training)) for index, layer in layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(index: int, layer: MoELayer, take: Callable[[Seen], None], training: bool) -> Callable[..., None]:
    def see(router: nn.Module, inputs: tuple[Tensor, Tensor], outputs: Any) -> None:
        if layer.statistics.counting and router.training == training == torch.is_grad_enabled():
            routing = outputs[0]
            none = routing.row < 0
            row = routing.row.clamp(min=0)
            expert, weight = routing.expert, routing.weight.detach()
            if not len(expert):  # no token here has any
                expert, weight = expert.new_zeros(1), weight.new_zeros(1)
            serial = layer.router.sequence.own(inputs[1]).flatten()
            take(Seen(index, serial, expert[row].masked_fill(none, -1), weight[row].masked_fill(none, 0)))

    return see


class HeldOutRecorder:
    """Sees on every rank which experts some tokens of an evaluation get.

    group: all ranks. num_layers: of the whole model. seq_len: tokens of a sequence. sequences: the numbers of those
    that are kept, evenly spaced from 0.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, *, num_layers: int, top_k: int, seq_len: int, sequences: range
    ) -> None:
        self.group, self.num_layers, self.top_k, self.seq_len = group, num_layers, top_k, seq_len
        self.sequences = sequences

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """See an evaluation."""
        device = next(model.parameters()).device
        self._found = torch.zeros(self.num_layers, len(self.sequences) * self.seq_len, 2 * self.top_k,
                                  dtype=torch.float64, device=device)
        with recording(model, self._take, training=False):
            yield

    def _take(self, seen: Seen) -> None:
        """Write down those tokens that are kept, expert + 1 and weight; what is not here stays zero."""
        none_last = (seen.expert < 0).byte().argsort(dim=1, stable=True)[:, : self.top_k]
        both = torch.cat((seen.expert.gather(1, none_last) + 1, seen.weight.gather(1, none_last)), 1).double()
        sequence, place = seen.serial.div(self.seq_len, rounding_mode="floor"), seen.serial % self.seq_len
        step = self.sequences.step
        kept = (sequence >= 0) & (sequence < self.sequences.stop) & (sequence % step == 0)
        self._found[seen.layer, (sequence // step * self.seq_len + place)[kept]] = both[kept]

    def result(self, layers: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Bring the ranks' parts together, in one collective.

        layers: those that are mixtures. -> on the first rank, [layers, tokens, top_k] each, padding in the end: experts
        int16, -1 = none; weights float32
        """
        found: Tensor = self._found
        if self.group is not None:
            dist.all_reduce(found, group=self.group)
            if dist.get_rank(self.group) != 0:
                return None
        expert, weight = found[list(layers)].cpu().split(self.top_k, -1)
        return (expert - 1).short().numpy(), weight.float().numpy()
