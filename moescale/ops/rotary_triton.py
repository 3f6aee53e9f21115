"""Rotary embedding as a Triton kernel: each number is read and written once.

Letters: H heads, of which a program rotates BLOCK at one position; D head_dim; F the power of two above half of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096  # pairs of features that a program rotates


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, sign: int) -> Tensor:
    """Rotate as `ops.rotary.rotate` does, or back when sign is -1; in float32. -> like x"""
    x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
    batch, seq, heads, features = x.shape
    half = triton.next_power_of_2(features // 2)
    block, out = min(max(1, NUMBERS // half), triton.next_power_of_2(heads)), torch.empty_like(x)
    if x.numel():
        _rotate[(batch * seq, triton.cdiv(heads, block))](
            x, cosine, sine, out, heads, features, SIGN=sign, F=half, BLOCK=block, num_warps=4, num_stages=1
        )
    return out


@triton.jit
def _rotate(X, Cosine, Sine, Out, H, D, SIGN: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate some heads at one position."""
    position = tl.program_id(0).to(tl.int64)
    head, feature, half = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, F), D // 2
    cosine = tl.load(Cosine + position * half + feature, mask=feature < half, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(Sine + position * half + feature, mask=feature < half, other=0.0).to(tl.float32)[None, :] * SIGN
    offset = (position * H + head)[:, None] * D + feature[None, :]
    mask = (head < H)[:, None] & (feature < half)[None, :]
    first = tl.load(X + offset, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(X + offset + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(Out + offset, (first * cosine - second * sine).to(Out.dtype.element_ty), mask=mask)
    tl.store(Out + offset + half, (second * cosine + first * sine).to(Out.dtype.element_ty), mask=mask)
