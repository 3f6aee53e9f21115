"""Linear attention: features of queries and keys take the place of the softmax, and sums that of the keys.

"Transformers are RNNs" (Katharopoulos et al., 2020): y = phi(q) sum(phi(k) v^T) / phi(q) sum(phi(k)), and phi(x) is
elu(x) + 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.comm.placement import Placement
from moescale.comm.sequence_shards import SequenceShards
from moescale.layers.linear import Linear
from moescale.mixers.base import Mixer
from moescale.mixers.recurrent_state import RecurrentState
from moescale.ops.linear_attention import causal_sums


class LinearAttention(Mixer[RecurrentState]):
    """Let positions of one document look back at each other in time linear in the sequence: a mixer."""

    def __init__(self, d_model: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.sequence = SequenceShards()
        self.q = Linear(d_model, num_heads * head_dim)
        self.k = Linear(d_model, num_heads * head_dim)
        self.v = Linear(d_model, num_heads * head_dim)
        self.o = Linear(num_heads * head_dim, d_model)

    def attach(self, placement: Placement) -> None:
        self.sequence = placement.sequence

    def forward(self, x: Tensor, positions: Tensor, state: RecurrentState | None = None) -> Tensor:
        """Weigh the values of each position's document up to it by products of features.

        x: [batch, seq/cp, d_model]. positions: [batch, seq] int64, restart at 0 with a document. state: the sums over
        the tokens before these. Returns features like x. Sums are at least float32.
        """
        q, k, v = (self._heads(linear(x)) for linear in (self.q, self.k, self.v))
        q, k = _features(q), _features(k)
        v = F.pad(v, (0, 1), value=1.0)  # one column more, whose sum divides the others
        restarts = self.sequence.apart(self.sequence.part(positions)) == 0
        sums, last = self.sequence.recur(
            lambda first: causal_sums(q, k, v, restarts, first), lambda before, _: before, positions,
            None if state is None else state["sums"])
        if state is not None:
            state.update(sums=last)
        out = self.sequence.together(sums[..., :-1] / sums[..., -1:])  # [batch, seq/cp, heads, head_dim]
        return self.o(out.flatten(2).to(x.dtype))

    def new_state(self, batch: int, length: int) -> RecurrentState:
        weight = self.q.weight
        return RecurrentState(sums=torch.zeros(
            batch, self.num_heads, self.head_dim, self.head_dim + 1, device=weight.device,
            dtype=torch.promote_types(weight.dtype, torch.float32)))

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, seq/cp, features] -> [rows, length, heads, head_dim], upcast"""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.sequence.apart(x).unflatten(2, (-1, self.head_dim))


def _features(x: Tensor) -> Tensor:
    """Compute elu(x) + 1, which is above zero: of small x it is exp(x), which adding 1 would round away."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
