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
        """Copy alpha, [1], once in a pass: FSDP gathers it when the module is called, and takes its memory back."""
        return self.alpha.to(dtype, copy=True)
