"""A transformer in a few lines of plain torch, for what another system's arguments and tensors say that it computes.

It shares no code with the models that are trained here, and nothing with the tables by which weights are converted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, base: float) -> Tensor:
    """Turn each pair of a head's features, one of its first half and one of its second, by position (RoPE).

    x: [batch, seq, heads, head_dim]
    """
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None, None] * base ** (-torch.arange(half) / half)
    first, second = x.split(half, -1)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def slopes(heads: int) -> Tensor:
    """Say what each head's scores lose with every position between (ALiBi, sec. 3). Returns [heads]."""
    power = 2 ** math.floor(math.log2(heads))
    steps = [*(8 * (head + 1) / power for head in range(power)), *(4 * (2 * head + 1) / power for head in range(power))]
    return 2.0 ** -torch.tensor(steps[:heads])


def attend(q: Tensor, k: Tensor, v: Tensor, before: int | None, slope: Tensor | None = None) -> Tensor:
    """Let each query look at its own position and those before it. Returns [batch, seq, heads x head_dim].

    q: [batch, seq, heads, head_dim]. k, v: the same with fewer heads, each for as many queries' heads in a row.
    before: how many positions before its own a query sees; None for all. slope: [heads], with ALiBi
    """
    ratio = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(ratio, 2), v.repeat_interleave(ratio, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    ago = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    if slope is not None:
        scores = scores - slope[:, None, None] * ago
    hidden = (ago < 0) | (ago > (q.shape[1] if before is None else before))
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)
    return mixed.flatten(2)


def feed_forward(x: Tensor, first: Sequence[Tensor], down: Tensor, activation: str) -> Tensor:
    """Compute `down` of the activation. first: gate and up, or up alone"""
    inner: dict[str, Callable[[Tensor], Tensor]] = {
        "swiglu": functional.silu, "geglu": functional.gelu, "gelu": functional.gelu, "relu": functional.relu,
    }
    hidden = inner[activation](x @ first[0].T)
    return (hidden * (x @ first[1].T) if len(first) > 1 else hidden) @ down.T

