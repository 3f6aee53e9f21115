"""Multi-head, multi-query and grouped-query attention, rotary or with linear biases, to all or some of the past."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moescale.comm.placement import Placement, call
from moescale.comm.sequence_shards import SequenceShards
from moescale.layers.linear import Linear
from moescale.layers.positions import alibi_slopes, rotary_angles
from moescale.mixers.base import Mixer
from moescale.mixers.key_value_cache import KeyValueCache
from moescale.ops.attention import attention
from moescale.ops.attention_pattern import NOTHING, Remembered, Visibility
from moescale.ops.attention_step import attention_step
from moescale.ops.rotary import rotate


class AttentionCore(nn.Module):
    """Attend to keys that are on this rank."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, visibility: Visibility, positions: Tensor,
        alibi_slopes: Tensor | None, remembered: Remembered,
    ) -> Tensor:
        """Arguments as in `ops.attention`."""
        return attention(
            q, k, v, positions=positions, alibi_slopes=alibi_slopes, remembered=remembered, **vars(visibility))


class Attention(Mixer[KeyValueCache]):
    """Let positions of one document look back at each other: a mixer.

    With `memory`, blocks are the segments of Transformer-XL (Dai et al., 2019, sec. 3.2): keys and values of the memory
    are projections of inputs through which no gradient flows, so that it reaches the matrices and not what earlier
    segments computed. Consecutive segments in one sequence are exactly what Transformer-XL sees when it trains on them
    one after another and updates its weights once a sequence. Memory reaches beyond neither sequence nor document.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        visibilities: Sequence[Visibility] = (Visibility(),),
        rope_theta: float | None = None,
        alibi: bool = False,
    ) -> None:
        """visibilities: what is seen by equal shares of the heads, in order."""
        super().__init__()
        self.head_dim, self.visibilities, self.rope_theta = head_dim, visibilities, rope_theta
        self.num_heads, self.num_kv_heads, self.alibi = num_heads, num_kv_heads, alibi
        self.first_head = 0  # of those that lie here
        self.kv_rows: slice | None = None  # of the weights of keys and values that lie here, which to use; None = all
        self.sequence = SequenceShards()
        self.core: nn.Module = AttentionCore()
        self.call_core = call
        self.q = Linear(d_model, num_heads * head_dim)
        self.k = Linear(d_model, num_kv_heads * head_dim)
        self.v = Linear(d_model, num_kv_heads * head_dim)
        self.o = Linear(num_heads * head_dim, d_model)

    def attach(self, placement: Placement) -> None:
        tp = placement.tp
        self.sequence, self.first_head = placement.sequence, tp.first(self.num_heads)
        # With fewer key heads than ranks every rank has all, and uses the one that its queries look at.
        if self.num_kv_heads % tp.size:
            head = tp.rank * self.num_kv_heads // tp.size
            self.kv_rows = slice(head * self.head_dim, (head + 1) * self.head_dim)
        self.core = placement.attention_core or self.core
        self.call_core = placement.call_eagerly

    def forward(self, x: Tensor, positions: Tensor, state: KeyValueCache | None = None) -> Tensor:
        """Let each position attend to those of its document that it sees.

        x: [batch, seq/cp, d_model]. positions: [batch, seq] int64, restart at 0 with a document. state: keys and values
        of the tokens before these. Returns features like x.
        """
        angles = None
        if self.rope_theta is not None:
            angles = rotary_angles(self.sequence.part(positions), self.head_dim, self.rope_theta)
            angles = angles[0].to(x.dtype), angles[1].to(x.dtype)
        q = self._turned(self.q(x), angles)
        k, v = self._keys_and_values(x, angles)
        slopes = self._slopes(q) if self.alibi else None
        if state is None:
            remembered = NOTHING
            if self.visibilities[0].memory and torch.is_grad_enabled():
                remembered = self._keys_and_values(x.detach(), angles)
            out = self._attend(q, k, v, positions, slopes, remembered)
        else:
            out = self._go_on(q, k, v, positions, slopes, state)
        return self.o(out.flatten(2))  # from [batch, seq/cp, heads, head_dim]

    def new_state(self, batch: int, length: int) -> KeyValueCache:
        reaches = [visibility.reach for visibility in self.visibilities]
        reach = None if None in reaches else max(reach for reach in reaches if reach is not None)
        slots = length if reach is None else min(reach, length)
        weight, rolls = self.k.weight, slots == reach
        return KeyValueCache(
            batch, slots, self.num_kv_heads, self.head_dim, rolls=rolls, dtype=weight.dtype, device=weight.device,
            global_tokens=self.visibilities[0].global_tokens if rolls else 0)

    def _keys_and_values(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        return self._turned(self.k(x, self.kv_rows), angles), self._turned(self.v(x, self.kv_rows), None)

    def _turned(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """Part the heads, and rotate them by the angles. -> [batch, seq/cp, heads, head_dim]"""
        x = x.unflatten(2, (-1, self.head_dim))
        return x if angles is None else rotate(x, *angles)

    def _go_on(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slopes: Tensor | None, state: KeyValueCache
    ) -> Tensor:
        """Let new tokens attend to themselves and to those of the state, which then holds them, too."""
        before = state.held
        if before and q.shape[1] == 1:
            return self._step(q, k, v, positions, slopes, state)
        if before and state.global_tokens:  # which lie at other distances than those of the keys beside them
            tokens = zip(q.split(1, 1), k.split(1, 1), v.split(1, 1), positions.split(1, 1), strict=True)
            return torch.cat([self._step(*token, slopes, state) for token in tokens], 1)
        keys, values = k, v
        if before:
            keys, values = (torch.cat(pair, 1) for pair in zip(state.newest_last(), (k, v), strict=True))
            # Positions count down into the state: 0 stands where the first token's document began.
            earlier = positions[:, :1] - torch.arange(before, 0, -1, device=positions.device)
            positions = torch.cat((earlier, positions), 1)
        state.add(k, v, positions)
        return self._attend(q, keys, values, positions, slopes)

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slopes: Tensor | None, state: KeyValueCache
    ) -> Tensor:
        """Let one new token a row attend to itself and to the state, which then holds it, too."""
        state.add(k, v, positions)
        keys, values, age = state.in_use(positions)

        def step(q: Tensor, heads: slice, slopes: Tensor | None, visibility: Visibility) -> Tensor:
            reach = min(state.held, visibility.reach or state.held)
            ages = torch.arange(0, reach, visibility.dilation, device=q.device)
            if state.global_tokens or visibility.global_tokens or len(ages) == state.held:
                return attention_step(q, keys[:, heads], values[:, heads], age, positions, slopes, visibility)
            some_keys, some_values = state.aged(ages)
            return attention_step(
                q, some_keys[:, heads], some_values[:, heads], ages, positions, slopes, visibility)

        return self._by_kind_of_heads(step, q, keys.shape[1], slopes)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slopes: Tensor | None,
        remembered: Remembered = NOTHING,
    ) -> Tensor:
        def attend(q: Tensor, heads: slice, slopes: Tensor | None, visibility: Visibility) -> Tensor:
            memory_k, memory_v = (None if each is None else each[:, :, heads] for each in remembered)
            return self.call_core(self.core, q, k[:, :, heads], v[:, :, heads], visibility=visibility,
                                  positions=positions, alibi_slopes=slopes, remembered=(memory_k, memory_v))

        return self._by_kind_of_heads(attend, q, k.shape[2], slopes)

    def _by_kind_of_heads(
        self, attend: Callable[[Tensor, slice, Tensor | None, Visibility], Tensor], q: Tensor, kv_heads: int,
        slopes: Tensor | None,
    ) -> Tensor:
        """Let heads that see the same attend together. attend: gets their queries, key heads, slopes and visibility."""
        outs, share = [], self.num_heads // len(self.visibilities)
        for number, visibility in enumerate(self.visibilities):
            first, last = (min(max(edge * share - self.first_head, 0), q.shape[2]) for edge in (number, number + 1))
            if first == last:
                continue  # these heads lie on other ranks
            group = q.shape[2] // kv_heads
            heads = slice(0, 1) if kv_heads == 1 else slice(first // group, last // group)
            outs.append(attend(q[:, :, first:last], heads, None if slopes is None else slopes[first:last], visibility))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _slopes(self, q: Tensor) -> Tensor:
        """Compute the slopes of this rank's heads. -> [heads] float32"""
        return alibi_slopes(self.num_heads).to(q.device)[self.first_head : self.first_head + q.shape[2]]
