"""The Legendre memory unit (LMU): hidden units beside memories of a window, in both forms (Voelker et al., 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moescale.comm.placement import Placement, Share, call
from moescale.comm.sequence_shards import SequenceShards
from moescale.layers.exact import Exact
from moescale.layers.linear import Linear
from moescale.mixers.base import Mixer
from moescale.mixers.hippo import remember
from moescale.mixers.recurrent_state import RecurrentState
from moescale.ops.hippo_memory import Memory
from moescale.ops.lmu import LmuWeights, lmu_cell


class LmuCell(Exact):
    """The part of the cell that runs position by position, in at least float32."""

    def __init__(self, memories: int, units: int, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.e_h = nn.Parameter(torch.empty(memories, units))
        self.e_m = nn.Parameter(torch.empty(memories, memories * memory.size))
        self.w_h = nn.Parameter(torch.empty(units, units))
        self.w_m = nn.Parameter(torch.empty(units, memories * memory.size))

    def forward(
        self, signal: Tensor, drive: Tensor, restarts: Tensor, hidden: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run it; arguments and results are those of `lmu_cell`."""
        a, b = (each.to(hidden.device, hidden.dtype) for each in self.memory.system())
        weights = LmuWeights(a, b, self.e_h, self.e_m, self.w_h, self.w_m)
        return lmu_cell(signal.to(hidden.dtype), drive.to(hidden.dtype), restarts, weights, hidden, memory)


class Lmu(Mixer[RecurrentState]):
    """Let hidden units see the features and what is remembered of signals: a mixer.

    Without `recurrent`, nothing but the memories goes from position to position, and all positions are computed
    together (Chilkuri and Eliasmith, 2021). Every rank of tp then has all memories, and its share of the units; with
    it, all units.
    """

    def __init__(self, d_model: int, memories: int, units: int, memory: Memory, *, recurrent: bool) -> None:
        super().__init__()
        self.memories, self.units, self.memory, self.recurrent = memories, units, memory, recurrent
        self.sequence, self.tp = SequenceShards(), Share()
        self.call_memory = call
        self.e_x = Linear(d_model, memories)
        self.w_x = Linear(d_model, units)
        if recurrent:
            self.cell = LmuCell(memories, units, memory)
        else:
            self.w_m = Linear(memories * memory.size, units)
        self.o = Linear(units, d_model)

    def attach(self, placement: Placement) -> None:
        self.sequence, self.tp, self.call_memory = placement.sequence, placement.tp, placement.call_eagerly

    def forward(self, x: Tensor, positions: Tensor, state: RecurrentState | None = None) -> Tensor:
        if self.recurrent:
            return self.o(self._cell(x, positions, state))
        first = None if state is None else state["memory"]
        held, last = self.call_memory(remember, self.e_x(x), positions, self.memory, self.sequence, first)
        if state is not None:
            state.update(memory=last)
        return self.o((self.w_x(x) + self.w_m(held.flatten(2))).tanh())

    def new_state(self, batch: int, length: int) -> RecurrentState:
        weight = self.e_x.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        tensors = {"memory": weight.new_zeros(batch, self.memories, self.memory.size, dtype=dtype)}
        if self.recurrent:
            tensors["hidden"] = weight.new_zeros(batch, self.units, dtype=dtype)
        return RecurrentState(**tensors)

    def _cell(self, x: Tensor, positions: Tensor, state: RecurrentState | None) -> Tensor:
        """Run the paper's cell. Returns the hidden units of this rank, [batch, seq, units/tp]."""
        state = self.new_state(len(x), x.shape[1]) if state is None else state
        out, hidden, memory = self.call_memory(
            self.cell, self.e_x(x), self.w_x(x), positions == 0, state["hidden"], state["memory"])
        state.update(hidden=hidden, memory=memory)
        share = self.units // self.tp.size
        return out[:, :, self.tp.first(self.units) :][:, :, :share].to(x.dtype)
