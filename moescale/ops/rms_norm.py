"""Root-mean-square norm in few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moescale.ops import native
from moescale.ops.device import triton_runs


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by the root of its mean square, then scale, in at least float32 (RMSNorm, eq. 4).

    x: [..., d_model], any floating dtype. weight: [d_model]. -> like x
    """
    if triton_runs(x):
        from moescale.ops import rms_norm_triton

        if x.shape[-1] <= rms_norm_triton.LARGEST:
            return rms_norm_triton.rms_norm(x, weight, eps)
    compiled = native.runs(x) and weight.dtype == x.dtype
    return (_CompiledRMSNorm if compiled else _RMSNorm).apply(x, weight, eps)


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
    @once_differentiable
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


class _CompiledRMSNorm(torch.autograd.Function):
    """The same on a processor with a compiler, in one pass each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        shape = inverse.numel(), x.shape[-1]
        native.call("norm", x.dtype, native.parts(*shape), x, weight, float(eps), *shape, out, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        grad_x, shape = torch.empty_like(x), (inverse.numel(), x.shape[-1])
        grad_weights = inverse.new_zeros(native.parts(*shape), x.shape[-1])  # one a thread
        native.call("norm_backward", x.dtype, len(grad_weights), grad.contiguous(), x, weight, inverse, *shape, grad_x,
                    grad_weights)
        return grad_x, grad_weights.sum(0).to(weight.dtype), None


def _upcast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype), weight.to(dtype)
