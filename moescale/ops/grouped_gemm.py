"""One matrix product per expert in one call, over rows sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_gemm(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiply each expert's rows with its matrix; an expert without rows gets a gradient of zeros.

    rows: [assignments, d_in], sorted by expert. weight: [experts, d_out, d_in]. tokens_per_expert: [experts] int64.
    -> [assignments, d_out]
    """
    if rows.dtype == torch.float64 or len(rows) == 0:
        return grouped_gemm_reference(rows, weight, tokens_per_expert)
    if rows.dtype == torch.bfloat16 and rows.device.type == "cpu":
        return _RoundedGemm.apply(rows, weight, tokens_per_expert.tolist())
    ends = tokens_per_expert.cumsum(0).to(torch.int32)
    return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)


def grouped_gemm_reference(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Do the same with a loop over experts; any floating dtype."""
    groups = rows.split(tokens_per_expert.tolist())
    return torch.cat([group @ matrix.T for group, matrix in zip(groups, weight.unbind(), strict=True)])


def _round_up(count: int) -> int:
    """Round to one of eight sizes an octave, and to 64 at least."""
    unit = max(64, 1 << max(0, count.bit_length() - 4))
    return -(-count // unit) * unit


class _RoundedGemm(torch.autograd.Function):
    """The product on CPU in bfloat16, with row counts rounded up.

    The CPU's bfloat16 product compiles a kernel for every new number of rows, which takes ten times longer than to run
    it, and routing brings new numbers at every step. A group is therefore multiplied together with some rows of the
    groups behind it; what they leave in the output is overwritten when their own turn comes.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sizes = sizes
        return _multiply(rows, weight.transpose(1, 2), sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        grad_weight = torch.empty_like(weight)
        start = 0
        for size, into in zip(ctx.sizes, grad_weight, strict=True):
            mine = grad.new_zeros(_round_up(size), grad.shape[1])  # zeros cancel the rows of other groups
            mine[:size] = grad[start : start + size]
            torch.mm(mine.T, _block(rows, start, len(mine)), out=into)
            start += size
        return _multiply(grad.contiguous(), weight, ctx.sizes), grad_weight, None


def _multiply(rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """rows: [assignments, d_in]. weight: [experts, d_in, d_out]. -> [assignments, d_out]"""
    out = rows.new_empty(len(rows) + _round_up(max(sizes)), weight.shape[2])
    start = 0
    for size, matrix in zip(sizes, weight, strict=True):
        if size:
            block = _block(rows, start, _round_up(size))
            torch.mm(block, matrix, out=out[start : start + len(block)])
        start += size
    return out[: len(rows)]


def _block(rows: Tensor, start: int, length: int) -> Tensor:
    """Take `length` rows from `start` on; zeros behind the last one."""
    block = rows[start : start + length]
    return block if len(block) == length else F.pad(block, (0, 0, 0, length - len(block)))
