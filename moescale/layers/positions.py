"""Where tokens are: rotary embedding, linear biases, sinusoids."""

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


def sinusoids(positions: Tensor, features: int) -> Tensor:
    """Give each position a vector: sines and cosines in turn, of slower and slower waves (Vaswani et al., 2017, 3.5).

    positions: [batch, seq] int64. Returns [batch, seq, features] float32.
    """
    feature = torch.arange(features, device=positions.device)
    angle = positions.to(torch.float32).unsqueeze(-1) * 10_000.0 ** (-(feature // 2 * 2) / features)
    return torch.where(feature % 2 == 0, angle.sin(), angle.cos())


def alibi_slopes(heads: int) -> Tensor:
    """Say how much each head's scores lose with distance: 2^(-8/heads) and its powers (ALiBi, sec. 3).

    Where heads is no power of two, the slopes of the power below it, and every second one of the power above.
    -> [heads] float32
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (index + 1) / power) for index in range(power)]
    slopes += [2 ** (-4 * (index + 1) / power) for index in range(0, 2 * power, 2)]
    return torch.tensor(slopes[:heads])
