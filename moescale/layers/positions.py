"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Say by what angle each pair of features turns at each position, in float32.

    positions: [batch, seq] int64. -> cosine, sine: [batch, seq, 1, head_dim / 2] float32
    """
    pair = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32)
    angle = positions.to(torch.float32).unsqueeze(-1) * theta ** (-2 * pair / head_dim)
    return angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)
