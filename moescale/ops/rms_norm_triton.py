"""RMSNorm as Triton kernels: each row is read once per direction; each program sums its part of the weight's gradient.

Letters: D d_model, BLOCK the power of two above it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 8192  # the largest d_model whose backward fits into registers
PROGRAMS = 256  # of the backward pass: more than a device has processors


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise as `ops.rms_norm.rms_norm` does; bfloat16, float16 or float32, d_model up to LARGEST. -> like x"""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out, inverse = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        if x.numel():
            _forward[(inverse.numel(),)](x, weight, out, inverse, x.shape[-1], eps, **_options(x))
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        rows, grad_x = inverse.numel(), torch.empty_like(x)
        programs = min(rows, PROGRAMS if x.device.type != "cpu" else 4)
        partial = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        if x.numel():
            _backward[(programs,)](
                grad.contiguous(), x, weight, inverse, grad_x, partial, rows, x.shape[-1], **_options(x)
            )
        return grad_x, partial.sum(0).to(weight.dtype), None


def _options(x: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(x.shape[-1])
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512)), "num_stages": 1}


@triton.jit
def _forward(X, Weight, Out, Inverse, D, eps, BLOCK: tl.constexpr):
    """Normalise one row, and store the inverse of its root mean square."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(X + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    weight = tl.load(Weight + column, mask=column < D, other=0.0).to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(x * x) / D + eps)
    tl.store(Inverse + row, inverse)
    tl.store(Out + row * D + column, (x * inverse * weight).to(Out.dtype.element_ty), mask=column < D)


@triton.jit
def _backward(Grad, X, Weight, Inverse, GradX, Partial, rows, D, BLOCK: tl.constexpr):
    """Compute the gradients of some rows, and their part of the weight's gradient."""
    column = tl.arange(0, BLOCK)
    weight = tl.load(Weight + column, mask=column < D, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64) * D + column
        grad = tl.load(Grad + offset, mask=column < D, other=0.0).to(tl.float32)
        normal = tl.load(X + offset, mask=column < D, other=0.0).to(tl.float32)
        inverse = tl.load(Inverse + row)
        normal *= inverse
        grad_weight += grad * normal
        grad *= weight
        grad_x = (grad - normal * (tl.sum(grad * normal) / D)) * inverse
        tl.store(GradX + offset, grad_x.to(GradX.dtype.element_ty), mask=column < D)
    tl.store(Partial + tl.program_id(0) * D + column, grad_weight, mask=column < D)
