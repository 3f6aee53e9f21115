"""Multi-head, multi-query and grouped-query attention with rotary positions or linear biases and a sliding window."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from moescale.comm.sequence_shards import Sequence
from moescale.layers.linear import Linear
from moescale.layers.positions import alibi_slopes, rotary_angles
from moescale.ops.attention import attention
from moescale.ops.rotary import rotate


class Attention(nn.Module):
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
        init: str,
    ) -> None:
        super().__init__()
        self.head_dim, self.window, self.rope_theta = head_dim, window, rope_theta
        self.num_heads, self.alibi = num_heads, alibi
        self.first_head = 0  # of those that lie here
        self.sequence = Sequence()
        self.attend: Callable[..., Tensor] = attention
        self.q = Linear(d_model, num_heads * head_dim, init)
        self.k = Linear(d_model, num_kv_heads * head_dim, init)
        self.v = Linear(d_model, num_kv_heads * head_dim, init)
        self.o = Linear(num_heads * head_dim, d_model, init)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [batch, seq/cp, d_model]. positions: [batch, seq] int64, restart at 0 with a document. -> like x"""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q(x).view(heads), self.k(x).view(heads), self.v(x).view(heads)
        if self.rope_theta is not None:
            angles = rotary_angles(self.sequence.part(positions), self.head_dim, self.rope_theta)
            cosine, sine = (angle.to(x.dtype) for angle in angles)
            q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        slopes = self._slopes(q) if self.alibi else None
        out = self.attend(q, k, v, window=self.window, positions=positions, alibi_slopes=slopes)
        return self.o(out.flatten(2))  # from [batch, seq/cp, heads, head_dim]

    def _slopes(self, q: Tensor) -> Tensor:
        """-> those of the heads that lie here"""
        return alibi_slopes(self.num_heads).to(q.device)[self.first_head : self.first_head + q.shape[2]]
