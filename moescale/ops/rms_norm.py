"""Root-mean-square norm in few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops import native
from moescale.ops.device import triton_runs
from moescale.ops.shares import run_on_rows


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
        rows, targets, inverses = x.view(-1, x.shape[-1]), out.view(-1, x.shape[-1]), inverse.view(-1)

        def run(part: slice) -> None:
            native.call("norm", x.dtype, rows[part], weight, eps, *rows[part].shape, targets[part], inverses[part])

        run_on_rows(run, *rows.shape)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        grad_x, d_model = torch.empty_like(x), x.shape[-1]
        rows, grads, targets = (each.view(-1, d_model) for each in (x, grad.contiguous(), grad_x))
        inverses, sums = inverse.view(-1), []  # of the weight's gradient, one a thread

        def run(part: slice) -> None:
            total = torch.zeros(d_model)
            sums.append((part.start or 0, total))
            native.call("norm_backward", x.dtype, grads[part], rows[part], weight, inverses[part], *rows[part].shape,
                        targets[part], total)

        run_on_rows(run, *rows.shape)
        grad_weight = torch.stack([total for _, total in sorted(sums, key=lambda each: each[0])]).sum(0)
        return grad_x, grad_weight.to(weight.dtype), None


def _upcast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype), weight.to(dtype)
