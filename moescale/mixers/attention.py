"""Multi-head, multi-query and grouped-query attention with rotary positions or linear biases and a sliding window."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moescale.comm.placement import Placement, call
from moescale.comm.sequence_shards import SequenceShards
from moescale.layers.linear import Linear
from moescale.layers.positions import alibi_slopes, rotary_angles
from moescale.mixers.base import Mixer
from moescale.mixers.key_value_cache import KeyValueCache
from moescale.ops.attention import attention
from moescale.ops.attention_step import attention_step
from moescale.ops.rotary import rotate


class AttentionCore(nn.Module):
    """Attend to keys that are on this rank."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, positions: Tensor, alibi_slopes: Tensor | None
    ) -> Tensor:
        """Arguments as in `ops.attention`."""
        return attention(q, k, v, window=window, positions=positions, alibi_slopes=alibi_slopes)


class Attention(Mixer[KeyValueCache]):
    """Let positions of one document look back at each other: a mixer."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        window: int | None,
        rope_theta: float | None = None,
        alibi: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim, self.window, self.rope_theta = head_dim, window, rope_theta
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
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q(x).view(heads)
        k, v = self.k(x, self.kv_rows).view(heads), self.v(x, self.kv_rows).view(heads)
        if self.rope_theta is not None:
            angles = rotary_angles(self.sequence.part(positions), self.head_dim, self.rope_theta)
            cosine, sine = (angle.to(x.dtype) for angle in angles)
            q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        slopes = self._slopes(q) if self.alibi else None
        if state is None:
            out = self.call_core(self.core, q, k, v, window=self.window, positions=positions, alibi_slopes=slopes)
        else:
            out = self._go_on(q, k, v, positions, slopes, state)
        return self.o(out.flatten(2))  # from [batch, seq/cp, heads, head_dim]

    def new_state(self, batch: int, length: int) -> KeyValueCache:
        slots = length if self.window is None else min(self.window, length)
        weight = self.k.weight
        return KeyValueCache(batch, slots, self.num_kv_heads, self.head_dim, rolls=slots == self.window,
                             dtype=weight.dtype, device=weight.device)

    def _go_on(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slopes: Tensor | None, state: KeyValueCache
    ) -> Tensor:
        """Let new tokens attend to themselves and to those of the state, which then holds them, too."""
        before = state.held
        if before and q.shape[1] == 1:
            state.add(k, v)
            return attention_step(q, *state.slots_in_use(), positions, slopes)
        keys, values = k, v
        if before:
            keys, values = (torch.cat(pair, 1) for pair in zip(state.newest_last(), (k, v), strict=True))
            # Positions count down into the state: 0 stands where the first token's document began.
            earlier = positions[:, :1] - torch.arange(before, 0, -1, device=positions.device)
            positions = torch.cat((earlier, positions), 1)
        state.add(k, v)
        return self.call_core(self.core, q, keys, values, window=self.window, positions=positions, alibi_slopes=slopes)

    def _slopes(self, q: Tensor) -> Tensor:
        """Compute the slopes of this rank's heads. -> [heads] float32"""
        return alibi_slopes(self.num_heads).to(q.device)[self.first_head : self.first_head + q.shape[2]]
