"""Running sums of the routing, kept on the device, outside the gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moescale.moe.routing import Routing


class Statistics(nn.Module):
    """Counts of one step, of this rank's tokens.

    tokens_per_expert: [experts] int64. dropped: scalar int64. surplus: scalar int64, rows that took a further pass.
    """

    tokens_per_expert: Tensor
    dropped: Tensor
    surplus: Tensor
    counting = True  # False while a part of the forward pass runs again in backward

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("tokens_per_expert", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        for name in ("dropped", "surplus"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def add(self, portions: list[Routing], dropped: Tensor) -> None:
        """Count one pass of the model. portions: of its routing, as they were computed. dropped: scalar int64"""
        if not self.counting:
            return
        self.tokens_per_expert += torch.stack([portion.tokens_per_expert for portion in portions]).sum(0)
        self.surplus += sum(len(portion.token) for portion in portions[1:])
        self.dropped += dropped

    def reset(self) -> None:
        for counts in self.buffers():
            counts.zero_()
