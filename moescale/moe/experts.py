"""Feed-forward experts, all of a layer in one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moescale.layers.feed_forward import ACTIVATIONS, GATED
from moescale.layers.linear import matrix_fill
from moescale.ops.collectives import local_tensor
from moescale.ops.expert_feed_forward import expert_feed_forward


class Experts(nn.Module):
    """The experts of one layer. gate, up: [experts, d_ff, d_model]; down: [experts, d_model, d_ff]"""

    def __init__(self, num_experts: int, d_model: int, d_ff: int, activation: str, init: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        wide = (num_experts, d_ff, d_model)
        self.gate = nn.Parameter(torch.empty(wide)) if activation in GATED else None
        self.up = nn.Parameter(torch.empty(wide))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.initial = {
            "gate": matrix_fill(init, d_model),
            "up": matrix_fill(init, d_model),
            "down": matrix_fill(init, d_ff),
        }

    def forward(self, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """rows: [received, d_model], sorted by expert. tokens_per_expert: [local_experts]. -> like rows"""
        gate = None if self.gate is None else local_tensor(self.gate).to(rows.dtype)
        up, down = local_tensor(self.up).to(rows.dtype), local_tensor(self.down).to(rows.dtype)
        return expert_feed_forward(rows, gate, up, down, tokens_per_expert, self.activation)
