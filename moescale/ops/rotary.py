"""Rotates pairs of features by an angle: each feature of a head's first half is paired with one of the second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moescale.ops import native
from moescale.ops.device import triton_runs


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each pair of features by its angle (RoFormer, eq. 34; halves paired as in the Hugging Face checkpoints).

    x: [batch, seq, heads, head_dim]. cosine, sine: [batch, seq, 1, head_dim / 2], of one dtype with x. -> like x
    """
    return _Rotate.apply(x, cosine, sine)


def rotate_reference(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Compute the same in plain steps."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


class _Rotate(torch.autograd.Function):
    """A rotation, whose gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotate(x, cosine, sine, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotate(grad, cosine, sine, -1), None, None


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, sign: int) -> Tensor:
    """Rotate, or back when sign is -1; x, cosine, sine: as in `rotate`. -> like x

    Over whole heads torch takes three passes; over half heads they would be five, and slower ones in bfloat16.
    """
    if triton_runs(x):
        from moescale.ops import rotary_triton

        return rotary_triton.rotate(x, cosine, sine, sign)
    if native.runs(x) and x.dtype == cosine.dtype == sine.dtype:
        batch, seq, heads, head_dim = x.shape
        half, out, x = head_dim // 2, x.new_empty(x.shape), x.contiguous()
        cosine, sine = (each.expand(batch, seq, 1, half).contiguous() for each in (cosine, sine))
        native.call("rotate", x.dtype, native.parts(batch * seq, heads * head_dim), x, cosine, sine, sign, batch * seq,
                    heads, half, out)
        return out
    partner = x.roll(x.shape[-1] // 2, -1)  # the halves change places
    return (x * torch.cat((cosine, cosine), -1)).addcmul_(partner, torch.cat((-sine, sine), -1), value=sign)
