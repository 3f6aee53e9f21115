"""Products of matrices, in float32 on processors that lack bfloat16 instructions.

There torch's bfloat16 product takes ten times as long as that of float32: there, and only there, factors are upcast
first, and the result is rounded as bfloat16 products are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.device import HAS_BFLOAT16


def upcasts(x: Tensor) -> bool:
    """Say whether products of such tensors are computed in float32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not HAS_BFLOAT16


def by_onednn(x: Tensor) -> bool:
    """Say whether a processor's products of such tensors are oneDNN's, which compiles a kernel for every shape."""
    if x.dtype == torch.float32:
        return torch.get_float32_matmul_precision() == "medium"  # as `prepare_processor` sets it
    return x.dtype == torch.bfloat16 and not upcasts(x)


def multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """Write a @ b into `out`, or add it to what is there; `out` may have another dtype. Outside autograd.

    a: [m, k]. b: [k, n]. -> out, [m, n]
    """
    if upcasts(a):
        a, b = a.float(), b.float()
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, beta=int(accumulate), out=out)
    product = a @ b
    return out.add_(product) if accumulate else out.copy_(product)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply features by a matrix.

    x: [..., d_in]. weight: [d_out, d_in], of the same dtype. -> [..., d_out]
    """
    return _UpcastLinear.apply(x, weight) if upcasts(x) else F.linear(x, weight)


class _UpcastLinear(torch.autograd.Function):
    """Keeps x and weight as they are for backward, and nothing in float32."""

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
