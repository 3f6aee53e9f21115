"""Share token windows out over ranks and micro-batches; the order depends on the seed and the step alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of packed documents.

    tokens: [batch, seq] int64. targets: [batch, seq] int64, -100 = ignored.
    positions: [batch, seq] int64, restart at 0 with each document.
    serial: [batch, seq] int64, the token's number in the whole run, from which its random draws come; -1 = padding.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    serial: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy to the device, without waiting for the copy."""
        move = {"device": device, "non_blocking": True}
        return Batch(*(part.to(**move) for part in (self.tokens, self.targets, self.positions, self.serial)))
