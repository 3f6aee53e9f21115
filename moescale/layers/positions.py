"""Rotary position embedding: the first half of a head's features is paired with the second half."""

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


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair of features by its angle (RoFormer, eq. 34; halves paired as in the Hugging Face checkpoints).

    x: [batch, seq, heads, head_dim]. cosine, sine: [batch, seq, 1, head_dim / 2]. -> like x
    """
    first, second = x.chunk(2, -1)
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
