"""Feed-forward experts, all of a layer in one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moescale.comm.collectives import local_tensor
from moescale.comm.placement import Placement
from moescale.layers.feed_forward import ACTIVATIONS
from moescale.moe.routing import Routing
from moescale.ops.expert_feed_forward import expert_feed_forward
from moescale.ops.token_random import uniform
from moescale.spec.feed_forward import GATED


class Experts(nn.Module):
    """The experts of one layer. gate, up: [experts, d_ff, d_model]. down: [experts, d_model, d_ff]

    dropout: share of the hidden features that training drops, drawn by token id (Switch Transformers, sec. 2.4).
    first: the number of the first expert, and of the first hidden feature, that lie here.
    """

    def __init__(
        self, num_experts: int, d_model: int, d_ff: int, activation: str, *, dropout: float = 0.0, salt: int = 0,
    ) -> None:
        super().__init__()
        self.num_experts, self.d_ff, self.dropout, self.salt = num_experts, d_ff, dropout, salt
        self.first, self.recomputes = (0, 0), False
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Parameter(torch.empty(num_experts, d_ff, d_model)) if activation in GATED else None
        self.up = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_ff))

    def attach(self, placement: Placement) -> None:
        self.first = (placement.experts.ep.first(self.num_experts), placement.experts.etp.first(self.d_ff))
        self.recomputes = placement.recompute == "selective"

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Apply each token's experts, and sum their weighed outputs. x: [tokens, d_model]. Returns features like x."""
        if self.recomputes:
            return checkpoint(self._apply_experts, x, routing, use_reentrant=False, preserve_rng_state=False)
        return self._apply_experts(x, routing)

    def _apply_experts(self, x: Tensor, routing: Routing) -> Tensor:
        gate = None if self.gate is None else local_tensor(self.gate).to(x.dtype)
        up, down = local_tensor(self.up).to(x.dtype), local_tensor(self.down).to(x.dtype)
        keep = self._keep(routing, up.shape[1]).to(x.dtype) if self.training and self.dropout else None
        return expert_feed_forward(x, gate, up, down, routing, self.activation, keep)

    def _keep(self, routing: Routing, local_features: int) -> Tensor:
        """Draw the factors of dropout, the same in every layout. -> [assignments, d_ff/etp] float32"""
        assert routing.token_id is not None
        first_expert, first_feature = self.first
        token_id = routing.token_id[routing.token] * self.num_experts + routing.expert + first_expert
        feature = first_feature + torch.arange(local_features, device=token_id.device)
        draws = uniform(token_id.unsqueeze(1) * self.d_ff + feature, self.salt)
        return (draws >= self.dropout) / (1 - self.dropout)
