"""Running sums of the routing, kept on the device, outside the gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moescale.moe.routing import Routing


class Statistics(nn.Module):
    """Counts of one step, of this rank's tokens. tokens_per_expert: [experts] int64. dropped: scalar int64"""

    tokens_per_expert: Tensor
    dropped: Tensor
    counting = True  # False while a part of the forward pass runs again in backward

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("tokens_per_expert", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def add(self, routing: Routing, dropped: Tensor) -> None:
        """Count one pass. dropped: scalar int64"""
        if not self.counting:
            return
        self.tokens_per_expert += routing.tokens_per_expert
        self.dropped += dropped

    def reset(self) -> None:
        self.tokens_per_expert.zero_()
        self.dropped.zero_()
