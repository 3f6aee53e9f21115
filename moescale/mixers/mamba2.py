"""Mamba-2: a recurrence with one decay a head, computed as products of matrices (Dao & Gu, 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescale.comm.collectives import local_tensor, sum_over
from moescale.comm.placement import Placement, Share, call
from moescale.comm.sequence_shards import SequenceShards
from moescale.layers.exact import Exact
from moescale.layers.linear import Linear
from moescale.mixers.base import Mixer
from moescale.mixers.mamba import Convolution
from moescale.mixers.recurrent_state import RecurrentState
from moescale.ops.ssd import ssd


class HeadScan(Exact):
    """Scan the heads of this rank, with steps, decays and states in at least float32. Weights are of all heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.step_bias, self.a_log, self.d = (nn.Parameter(torch.empty(heads)) for _ in range(3))
        self.share, self.sequence = Share(), SequenceShards()

    def attach(self, placement: Placement) -> None:
        self.share, self.sequence = placement.tp, placement.sequence

    def forward(
        self, x: Tensor, step: Tensor, b: Tensor, c: Tensor, positions: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scan each piece that is here.

        x: [rows, length, heads, head_dim]. step: [rows, length, heads], before bias and softplus; b, c: [rows, length,
        groups, d_state]. positions: [batch, seq], whole. first: the state before. Returns y like x, the last states.
        """
        bias, a_log, d = (self.share.part(local_tensor(each)) for each in (self.step_bias, self.a_log, self.d))
        delta, a = F.softplus(step.to(bias.dtype) + bias), -a_log.exp()
        restarts = self.sequence.apart(self.sequence.part(positions)) == 0
        passes = (delta.sum(1) * a).exp()[..., None, None]
        return self.sequence.recur(lambda state: ssd(x, delta, a, b, c, d, restarts, state), passes, positions, first)


class GatedNorm(nn.Module):
    """Gate, and divide each group of channels by the root of its mean square. weight: [channels], of all ranks"""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight, self.groups, self.eps = nn.Parameter(torch.empty(channels)), groups, eps
        self.share = Share()

    def attach(self, placement: Placement) -> None:
        self.share = placement.tp

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate: [..., channels] of this rank. Returns the same, the statistics being in at least float32."""
        dtype, weight = torch.promote_types(x.dtype, torch.float32), self.share.part(local_tensor(self.weight))
        gated = x.to(dtype) * F.silu(gate.to(dtype))
        here = groups_here(self.groups, self.share)
        by_group = gated.unflatten(-1, (here.stop - here.start, -1))
        squares = by_group.square().sum(-1)
        if self.share.size > 1:  # a group may lie on several ranks
            squares = sum_over(F.pad(squares, (here.start, self.groups - here.stop)), self.share.group)[..., here]
        size = len(self.weight) // self.groups
        scaled = by_group * (squares / size + self.eps).rsqrt().unsqueeze(-1)
        return (scaled.flatten(-2) * weight.to(dtype)).to(x.dtype)


class Mamba2(Mixer[RecurrentState]):
    """Let positions of one document look back through a state of constant size, head by head: a mixer."""

    def __init__(
        self, d_model: int, channels: int, *, head_dim: int, groups: int, d_state: int, d_conv: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.channels, self.head_dim, self.groups, self.d_state, self.width = (
            channels, head_dim, groups, d_state, d_conv)
        self.sequence, self.share = SequenceShards(), Share()
        self.call = call
        heads, states = channels // head_dim, 2 * groups * d_state
        self.x, self.gate = Linear(d_model, channels), Linear(d_model, channels)
        self.select, self.step = Linear(d_model, states), Linear(d_model, heads)
        self.conv, self.select_conv = Convolution(channels, d_conv), Convolution(states, d_conv, cut=False)
        self.scan, self.norm = HeadScan(heads), GatedNorm(channels, groups, norm_eps)
        self.out = Linear(channels, d_model)

    def attach(self, placement: Placement) -> None:
        self.sequence, self.share, self.call = placement.sequence, placement.tp, placement.call_eagerly

    def forward(self, x: Tensor, positions: Tensor, state: RecurrentState | None = None) -> Tensor:
        """Go over each document from its beginning, or from a state.

        x: [batch, seq/cp, d_model]. positions: [batch, seq] int64, restart at 0 with a document. state: of the tokens
        before these. Returns features like x.
        """
        apart, here = self.sequence.apart, self.sequence.apart(self.sequence.part(positions))
        gate, features = self.gate(x), apart(torch.cat((self.x(x), self.select(x)), -1))
        before = self.sequence.before(features, self.width - 1) if state is None else state["inputs"]
        states = 2 * self.groups * self.d_state
        channels = features.shape[-1] - states
        inputs, selected = (
            F.silu(self.call(conv, part, here, earlier)) for conv, part, earlier in zip(
                (self.conv, self.select_conv), features.split((channels, states), -1),
                before.split((channels, states), -1), strict=True))
        by_group = selected.unflatten(-1, (2, self.groups, self.d_state))
        b, c = by_group[..., groups_here(self.groups, self.share), :].unbind(2)
        step = apart(self.share.part(self.step(x), -1))
        y, last = self.call(self.scan, inputs.unflatten(-1, (-1, self.head_dim)), step, b, c, positions,
                            None if state is None else state["states"])
        if state is not None:
            joined = torch.cat((before, features), 1)
            state.update(inputs=joined[:, joined.shape[1] - self.width + 1 :], states=last)
        return self.out(self.call(self.norm, self.sequence.together(y.flatten(2)), gate))

    def new_state(self, batch: int, length: int) -> RecurrentState:
        weight, features = self.x.weight, self.channels + 2 * self.groups * self.d_state
        return RecurrentState(
            inputs=weight.new_zeros(batch, self.width - 1, features),
            states=weight.new_zeros(batch, self.channels // self.head_dim, self.head_dim, self.d_state,
                                    dtype=torch.promote_types(weight.dtype, torch.float32)))


def groups_here(groups: int, share: Share) -> slice:
    """Find the groups of which this rank has channels: some, or a part of one."""
    first = groups * share.rank // share.size
    return slice(first, first + max(1, groups // share.size))
