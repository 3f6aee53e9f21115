"""Grouped GEMM: one matrix product per expert in one call, over rows sorted by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.device import triton_runs
from moescale.ops.product import upcasts


def grouped_gemm(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix; the gradient of an expert without rows is zero.

    rows: [assignments, d_in], sorted by expert. weight: [experts, d_out, d_in]. tokens_per_expert: [experts] int64.
    -> [assignments, d_out]
    """
    if rows.dtype == torch.float64 or len(rows) == 0:
        return grouped_gemm_reference(rows, weight, tokens_per_expert)
    if triton_runs(rows):
        from moescale.ops import grouped_gemm_triton

        return grouped_gemm_triton.grouped_gemm(rows, weight, tokens_per_expert)
    if upcasts(rows):
        return grouped_gemm(rows.float(), weight.float(), tokens_per_expert).to(rows.dtype)
    (d_out, d_in), multiple = weight.shape[1:], 16 // rows.element_size()
    if d_out % multiple or d_in % multiple:  # torch asks for rows of whole 16 bytes, which etp's part may not be
        rows = F.pad(rows, (0, -d_in % multiple))
        weight = F.pad(weight, (0, -d_in % multiple, 0, -d_out % multiple))
        return grouped_gemm(rows, weight, tokens_per_expert)[:, :d_out]
    ends = tokens_per_expert.cumsum(0).to(torch.int32)
    return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)


def grouped_gemm_reference(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Compute the same with a loop over experts; any floating dtype."""
    groups = rows.split(tokens_per_expert.tolist())
    return torch.cat([group @ matrix.T for group, matrix in zip(groups, weight.unbind(), strict=True)])
