"""Residuals with a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ReZero(nn.Module):
    """The weight of what both sublayers of a block add, 0 at first (Bachlechner et al., 2020, section 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Give alpha, [1]. It is asked for once in a pass, as FSDP gathers what a module has when it is called."""
        return self.alpha.to(dtype)
