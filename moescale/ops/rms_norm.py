"""Root-mean-square norm in few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.device import triton_runs


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by the root of its mean square, then scale, in at least float32 (RMSNorm, eq. 4).

    x: [..., d_model], any floating dtype. weight: [d_model]. -> like x
    """
    if triton_runs(x):
        from moescale.ops import rms_norm_triton

        if x.shape[-1] <= rms_norm_triton.LARGEST:
            return rms_norm_triton.rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute the same with torch's own function and autograd."""
    upcast_x, upcast_weight = _upcast(x, weight)
    return F.rms_norm(upcast_x, weight.shape, upcast_weight, eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        upcast_x, upcast_weight = _upcast(x, weight)
        squares = torch.linalg.vector_norm(upcast_x, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (upcast_x * inverse).mul_(upcast_weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        upcast_x, upcast_weight = _upcast(x, weight)
        d_model = x.shape[-1]
        grad = grad.to(upcast_x.dtype)
        # The weight's gradient: normalised features times gradient, summed over rows.
        product = (grad * upcast_x).reshape(-1, d_model)  # [rows, d_model]
        grad_weight = inverse.flatten() @ product
        # The features': through the scale, and through the row's root mean square.
        slope = (product @ upcast_weight).view_as(inverse).mul_(inverse.pow(3)).div_(-d_model)
        grad_x = (grad * upcast_weight).mul_(inverse).addcmul_(upcast_x, slope)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _upcast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype), weight.to(dtype)
