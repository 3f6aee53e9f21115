"""A memory cell: HiPPO remembers signals projected from the features, and each position reads all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from moescale.comm.placement import Placement, call
from moescale.comm.sequence_shards import SequenceShards
from moescale.layers.linear import Linear
from moescale.mixers.base import Mixer
from moescale.mixers.recurrent_state import RecurrentState
from moescale.ops.hippo_memory import Memory, after_zeros, hippo_memory


class Hippo(Mixer[RecurrentState]):
    """Let positions know what came before them in their document: a mixer."""

    def __init__(self, d_model: int, channels: int, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.sequence = SequenceShards()
        self.call_memory = call
        self.u = Linear(d_model, channels)
        self.o = Linear(channels * memory.size, d_model)

    def attach(self, placement: Placement) -> None:
        self.sequence, self.call_memory = placement.sequence, placement.call_eagerly

    def forward(self, x: Tensor, positions: Tensor, state: RecurrentState | None = None) -> Tensor:
        first = None if state is None else state["memory"]
        held, last = self.call_memory(remember, self.u(x), positions, self.memory, self.sequence, first)
        if state is not None:
            state.update(memory=last)
        return self.o(held.flatten(2))

    def new_state(self, batch: int, length: int) -> RecurrentState:
        weight = self.u.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return RecurrentState(memory=weight.new_zeros(batch, len(weight), self.memory.size, dtype=dtype))


def remember(
    u: Tensor, positions: Tensor, memory: Memory, sequence: SequenceShards, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the memories of signals over the positions that are here.

    u: [batch, seq/cp, channels]. positions: [batch, seq] int64. first: [batch, channels, size], the state before the
    sequence, if there is one. Returns [batch, seq/cp, channels, size] like u, and the last state of each piece.
    """
    pieces, at = sequence.apart(u), sequence.apart(sequence.part(positions))
    held, last = sequence.recur(
        lambda before: hippo_memory(pieces, at, memory, before),
        lambda before, piece: after_zeros(before, piece[:, 0], piece.shape[1], memory), positions, first)
    return sequence.together(held), last
