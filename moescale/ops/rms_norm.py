"""Root-mean-square norm in few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.device import triton_runs


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by the root of its mean square, then scale; at least float32 inside (RMSNorm, eq. 4).

    x: [..., d_model], any floating dtype. weight: [d_model]. -> like x
    """
    if triton_runs(x):
        from moescale.ops import rms_norm_triton

        if x.shape[-1] <= rms_norm_triton.LARGEST:
            return rms_norm_triton.rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Do the same by torch's own function and autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide, scale = _wide(x, weight)
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, scale = _wide(x, weight)
        d_model = x.shape[-1]
        grad = grad.to(wide.dtype)
        product = (grad * wide).view(-1, d_model)  # [rows, d_model]
        grad_weight = inverse.view(-1) @ product
        slope = (product @ scale).view_as(inverse).mul_(inverse.pow(3)).div_(-d_model)
        grad_x = (grad * scale).mul_(inverse).addcmul_(wide, slope)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _wide(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype), weight.to(dtype)
