"""Copies tokens to rows sorted by expert, and adds rows up by token: gathers both ways, in forward and backward.

Autograd's own backward of `x[token]` scatters row by row. With the inverse map it is a gather and a sum over each
token's choices, which is deterministic and many times faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moescale.ops import native
from moescale.ops.device import triton_runs


def permute(x: Tensor, token: Tensor, row: Tensor) -> Tensor:
    """Copy each assignment's token into its row.

    x: [tokens, d_model]. token: [assignments] int64, the token of each row.
    row: [tokens, choices] int64, the inverse: the row of each choice, -1 = none.
    -> [assignments, d_model]
    """
    if triton_runs(x):
        from moescale.ops import permute_triton

        return permute_triton.permute(x, token, row)
    return _Permute.apply(x, token, row)


def unpermute(rows: Tensor, weight: Tensor | None, token: Tensor, row: Tensor) -> Tensor:
    """Sum each token's weighed rows in float32; a token without rows gives zeros.

    rows: [assignments, d_model]. weight: [assignments] float32, None = ones. token, row: as in `permute`.
    -> [tokens, d_model] in the dtype of rows
    """
    if triton_runs(rows) and weight is not None:
        from moescale.ops import permute_triton

        return permute_triton.unpermute(rows, weight, token, row)
    return _Unpermute.apply(rows, weight, token, row)


def reorder(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Take rows in another order.

    rows: [rows, d_model]. order, inverse: [rows] int64, inverse permutations of each other. -> [rows, d_model]
    """
    return _Permute.apply(rows, order, inverse.unsqueeze(1))


def _sum_of_rows(rows: Tensor, weight: Tensor | None, row: Tensor) -> Tensor:
    """Sum weight * rows[row] over choices in at least float32.

    rows: [assignments, d_model]. weight: [tokens, choices], None = ones. row: [tokens, choices], -1 = none.
    -> [tokens, d_model] in the dtype of rows
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    partial = len(rows) != row.numel()  # some choices have no row
    if len(rows) == 0:
        return rows.new_zeros(row.shape[0], rows.shape[1])
    if native.runs(rows) and native.runs(row):
        (tokens, choices), width = row.shape, rows.shape[1]
        out = rows.new_empty(tokens, width)
        factor = None if weight is None else weight.to(dtype).contiguous()
        native.call("sum_rows", rows.dtype, native.parts(len(rows), width), rows.contiguous(), factor, row.contiguous(),
                    tokens, choices, width, out)
        return out
    total: Tensor | None = None
    for choice in range(row.shape[1]):
        index = row[:, choice]
        chosen = rows.index_select(0, index.clamp(min=0))  # [tokens, d_model]
        if partial:
            chosen = chosen.masked_fill_((index < 0).unsqueeze(1), 0)
        chosen = chosen.to(dtype)
        factor = None if weight is None else weight[:, choice].to(dtype).unsqueeze(1)
        if total is None:
            total = chosen if factor is None else chosen.mul_(factor)
        elif factor is None:
            total += chosen
        else:
            total.addcmul_(chosen, factor)
    assert total is not None, "a token has at least one choice"
    return total.to(rows.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (row,) = ctx.saved_tensors
        if row.shape[1] == 1 and len(grad) == len(row):
            return grad.index_select(0, row[:, 0]), None, None
        return _sum_of_rows(grad, None, row), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor | None, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(*((token,) if weight is None else (token, weight, rows)))
        by_choice = None
        if weight is not None:
            by_choice = weight.new_zeros(row.shape) if len(rows) == 0 else weight[row.clamp(min=0)]
        return _sum_of_rows(rows, by_choice, row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        token, *weighed = ctx.saved_tensors
        grad_rows = grad.index_select(0, token)  # [assignments, d_model]
        if not weighed:
            return grad_rows, None, None, None
        weight, rows = weighed
        grad_weight = torch.linalg.vecdot(grad_rows.to(weight.dtype), rows.to(weight.dtype))
        return grad_rows * weight.unsqueeze(1).to(grad.dtype), grad_weight, None, None
