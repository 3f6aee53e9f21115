"""One matrix product per expert in one call, over rows sorted by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.device import triton_runs
from moescale.ops.product import widens


def grouped_gemm(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiply each expert's rows with its matrix; an expert without rows gets a gradient of zeros.

    rows: [assignments, d_in], sorted by expert. weight: [experts, d_out, d_in]. tokens_per_expert: [experts] int64.
    -> [assignments, d_out]
    """
    if rows.dtype == torch.float64 or len(rows) == 0:
        return grouped_gemm_reference(rows, weight, tokens_per_expert)
    if triton_runs(rows):
        from moescale.ops import grouped_gemm_triton

        return grouped_gemm_triton.grouped_gemm(rows, weight, tokens_per_expert)
    if widens(rows):
        return grouped_gemm(rows.float(), weight.float(), tokens_per_expert).to(rows.dtype)
    (d_out, d_in), width = weight.shape[1:], 16 // rows.element_size()
    if d_out % width or d_in % width:  # what `etp` leaves of d_ff may not be rows of 16 bytes, which torch wants
        rows = F.pad(rows, (0, -d_in % width))
        weight = F.pad(weight, (0, -d_in % width, 0, -d_out % width))
        return grouped_gemm(rows, weight, tokens_per_expert)[:, :d_out]
    ends = tokens_per_expert.cumsum(0).to(torch.int32)
    return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)


def grouped_gemm_reference(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Do the same with a loop over experts; any floating dtype."""
    groups = rows.split(tokens_per_expert.tolist())
    return torch.cat([group @ matrix.T for group, matrix in zip(groups, weight.unbind(), strict=True)])
