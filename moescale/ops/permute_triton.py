"""Permute and unpermute as Triton kernels: gathers both ways, sums over choices in order, no atomics.

Letters: D d_model. A program works on BLOCK features of one token or row at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def permute(x: Tensor, token: Tensor, row: Tensor) -> Tensor:
    """Permute as `ops.permute.permute` does. -> [assignments, d_model]"""
    return _Permute.apply(x, token, row)


def unpermute(rows: Tensor, weight: Tensor, token: Tensor, row: Tensor) -> Tensor:
    """Unpermute as `ops.permute.unpermute` does. -> [tokens, d_model]"""
    return _Unpermute.apply(rows, weight.contiguous(), token.contiguous(), row)


def sum_of_rows(rows: Tensor, weight: Tensor | None, row: Tensor) -> Tensor:
    """Sum each token's rows in float32, times their weights if given.

    rows: [assignments, d_model]. weight: [assignments] float32, None = ones. row: [tokens, choices] int64, -1 = none.
    -> [tokens, d_model] in the dtype of rows
    """
    tokens, choices = row.shape
    if len(rows) == 0:
        return rows.new_zeros(tokens, rows.shape[1])
    out = torch.empty(tokens, rows.shape[1], dtype=rows.dtype, device=rows.device)
    if out.numel():
        _sum[(tokens, triton.cdiv(rows.shape[1], BLOCK))](
            rows.contiguous(), weight, row.contiguous(), out, rows.shape[1], CHOICES=choices,
            WEIGHED=weight is not None, BLOCK=BLOCK, num_warps=4, num_stages=1,
        )
    return out


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_of_rows(grad, None, *ctx.saved_tensors), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, token: Tensor, row: Tensor) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight, token)
        return sum_of_rows(rows, weight, row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, token = ctx.saved_tensors
        grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
        if len(rows):
            _spread[(len(rows),)](
                grad.contiguous(), rows, weight, token, grad_rows, grad_weight, rows.shape[1], BLOCK=BLOCK,
                num_warps=4, num_stages=1,
            )
        return grad_rows, grad_weight, None, None


@triton.jit
def _sum(Rows, Weight, Row, Out, D, CHOICES: tl.constexpr, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """Sum one token's rows, choice by choice."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(CHOICES):
        row = tl.load(Row + token * CHOICES + choice)
        width, row = tl.where(row >= 0, D, 0), tl.maximum(row, 0)
        x = tl.load(Rows + row * D + column, mask=column < width, other=0.0).to(tl.float32)
        if WEIGHED:
            x *= tl.load(Weight + row)
        total += x
    tl.store(Out + token * D + column, total.to(Out.dtype.element_ty), mask=column < D)


@triton.jit
def _spread(Grad, Rows, Weight, Token, GradRows, GradWeight, D, BLOCK: tl.constexpr):
    """Compute a row's gradient, weight * grad of its token, and its weight's, the product of row and grad."""
    row = tl.program_id(0).to(tl.int64)
    token, weight = tl.load(Token + row), tl.load(Weight + row)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        grad = tl.load(Grad + token * D + column, mask=column < D, other=0.0).to(tl.float32)
        x = tl.load(Rows + row * D + column, mask=column < D, other=0.0).to(tl.float32)
        product += grad * x
        tl.store(GradRows + row * D + column, (grad * weight).to(GradRows.dtype.element_ty), mask=column < D)
    tl.store(GradWeight + row, tl.sum(product))
