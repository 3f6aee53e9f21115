"""Mamba: a short convolution, then a recurrence whose step, input and output each token chooses (Gu & Dao, 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescale.comm.collectives import local_tensor, sum_over
from moescale.comm.placement import Placement, Share, call
from moescale.comm.sequence_shards import SequenceShards
from moescale.layers.exact import Exact
from moescale.layers.linear import Linear
from moescale.layers.norm import RMSNorm
from moescale.mixers.base import Mixer
from moescale.mixers.recurrent_state import RecurrentState
from moescale.ops.causal_conv import causal_conv
from moescale.ops.product import linear
from moescale.ops.scan import selective_scan


class Convolution(nn.Module):
    """Convolve the channels of this rank along a document. weight: [channels, width], bias: [channels], of all.

    cut: whether the ranks of tp share the channels; otherwise each has all.
    """

    def __init__(self, channels: int, width: int, *, cut: bool = True) -> None:
        super().__init__()
        self.cut = cut
        self.weight, self.bias = nn.Parameter(torch.empty(channels, width)), nn.Parameter(torch.empty(channels))
        self.share = Share()

    def attach(self, placement: Placement) -> None:
        self.share = placement.tp if self.cut else Share()

    def forward(self, x: Tensor, positions: Tensor, before: Tensor) -> Tensor:
        """Arguments as in `ops.causal_conv`."""
        weight, bias = (self.share.part(local_tensor(each)).to(x.dtype) for each in (self.weight, self.bias))
        return causal_conv(x, weight, bias, positions, before)


class SelectiveScan(Exact):
    """Scan the channels of this rank, with steps, decays and states in at least float32. Weights are of all channels.

    step: [channels, rank], step_bias: [channels]; a_log: [channels, d_state]; d: [channels].
    """

    def __init__(self, channels: int, rank: int, d_state: int) -> None:
        super().__init__()
        self.step, self.step_bias = nn.Parameter(torch.empty(channels, rank)), nn.Parameter(torch.empty(channels))
        self.a_log, self.d = nn.Parameter(torch.empty(channels, d_state)), nn.Parameter(torch.empty(channels))
        self.share, self.sequence = Share(), SequenceShards()

    def attach(self, placement: Placement) -> None:
        self.share, self.sequence = placement.tp, placement.sequence

    def forward(
        self, u: Tensor, step: Tensor, b: Tensor, c: Tensor, positions: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scan each piece that is here.

        u: [rows, length, channels]. step: [rows, length, rank], before its matrix; b, c: [rows, length, d_state]; all
        at least float32. positions: [batch, seq], whole. first: the state before. Returns y like u, the last states.
        """
        matrix, bias, a_log, d = (self.share.part(local_tensor(each))
                                  for each in (self.step, self.step_bias, self.a_log, self.d))
        delta, a = F.softplus(linear(step, matrix) + bias), -a_log.exp()
        restarts = self.sequence.apart(self.sequence.part(positions)) == 0
        passes = (delta.sum(1).unsqueeze(-1) * a).exp()
        return self.sequence.recur(
            lambda state: selective_scan(u, delta, a, b, c, d, restarts, state), passes, positions, first)


class Mamba(Mixer[RecurrentState]):
    """Let positions of one document look back through a state of constant size: a mixer."""

    def __init__(
        self, d_model: int, channels: int, *, d_state: int, d_conv: int, rank: int, norm_eps: float | None = None
    ) -> None:
        """norm_eps: of the norms of steps, inputs and outputs; None = none (Jamba has them, Mamba has not)."""
        super().__init__()
        self.channels, self.sizes, self.width = channels, (rank, d_state, d_state), d_conv
        self.sequence, self.share = SequenceShards(), Share()
        self.call = call
        self.x, self.gate = Linear(d_model, channels), Linear(d_model, channels)
        self.conv = Convolution(channels, d_conv)
        self.select = Linear(channels, sum(self.sizes))
        self.step_norm, self.b_norm, self.c_norm = (
            None if norm_eps is None else RMSNorm(size, norm_eps) for size in self.sizes)
        self.scan = SelectiveScan(channels, rank, d_state)
        self.out = Linear(channels, d_model)

    def attach(self, placement: Placement) -> None:
        self.sequence, self.share, self.call = placement.sequence, placement.tp, placement.call_eagerly

    def forward(self, x: Tensor, positions: Tensor, state: RecurrentState | None = None) -> Tensor:
        """Go over each document from its beginning, or from a state.

        x: [batch, seq/cp, d_model]. positions: [batch, seq] int64, restart at 0 with a document. state: of the tokens
        before these. Returns features like x.
        """
        inputs, gate = self.sequence.apart(self.x(x)), self.gate(x)
        here = self.sequence.apart(self.sequence.part(positions))
        before = self.sequence.before(inputs, self.width - 1) if state is None else state["inputs"]
        u = F.silu(self.call(self.conv, inputs, here, before))
        y, last = self.call(self.scan, u, *self._select(u), positions, None if state is None else state["states"])
        if state is not None:
            joined = torch.cat((before, inputs), 1)
            state.update(inputs=joined[:, joined.shape[1] - self.width + 1 :], states=last)
        return self.out(self.sequence.together(y) * F.silu(gate))

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute from all channels what steps are made of, and how each state takes in and is read."""
        upcast = torch.promote_types(u.dtype, torch.float32)
        chosen = self.call(sum_over, self.select(u, columns=self.share).to(upcast), self.share.group)
        parts = chosen.split(self.sizes, -1)
        norms = self.step_norm, self.b_norm, self.c_norm
        step, b, c = (part if norm is None else norm(part) for norm, part in zip(norms, parts, strict=True))
        return step, b, c

    def new_state(self, batch: int, length: int) -> RecurrentState:
        weight, d_state = self.x.weight, self.sizes[1]
        return RecurrentState(
            inputs=weight.new_zeros(batch, self.width - 1, self.channels),
            states=weight.new_zeros(batch, self.channels, d_state,
                                    dtype=torch.promote_types(weight.dtype, torch.float32)))
