"""Products of matrices.

Without instructions for bfloat16, a processor takes ten times as long for torch's product as for float32's: there, and
only there, factors are widened first, and the result rounded as bfloat16 products are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.device import HAS_BFLOAT16


def widens(x: Tensor) -> bool:
    """Say whether products of such tensors are made in float32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not HAS_BFLOAT16


def multiply(a: Tensor, b: Tensor, out: Tensor, more: int = 0) -> Tensor:
    """Write a @ b into `out`, or with more = 1 add it to what is there, also in another dtype; no autograd. -> out"""
    if widens(a):
        a, b = a.float(), b.float()
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, beta=more, out=out)
    product = a @ b
    return out.add_(product) if more else out.copy_(product)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x: [..., d_in]. weight: [d_out, d_in], of the same dtype. -> [..., d_out]"""
    return _Widened.apply(x, weight) if widens(x) else F.linear(x, weight)


class _Widened(torch.autograd.Function):
    """Nothing in float32 is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad, grad_x, grad_weight = grad.float(), None, None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2).float()).to(weight.dtype)
        return grad_x, grad_weight
