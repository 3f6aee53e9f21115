"""Matrices. A weight is float32; it is cast to the dtype of what it meets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescale.comm.collectives import local_tensor
from moescale.comm.placement import Placement, Share
from moescale.ops.product import linear

T = TypeVar("T")


class Linear(nn.Module):
    """Multiply by a matrix, without bias. weight: [d_out, d_in]"""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor, rows: slice | None = None, columns: Share | None = None) -> Tensor:
        """Multiply. x: [..., d_in]. rows: of the weight here, which to use. Returns [..., d_out] in the dtype of x.

        columns: x is such a share of the features, and the result one of the sums over them.
        """
        weight = local_tensor(self.weight)
        if rows is not None:  # slice(None) would make the gradient a copy
            weight = weight[rows]
        if columns is not None:
            weight = columns.part(weight, 1)
        return linear(x, weight.to(x.dtype))


class Embedding(nn.Module):
    """Look up one row a token. weight: [vocab, d_model]"""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.vocabulary = Share()

    def attach(self, placement: Placement) -> None:
        self.vocabulary = placement.tp

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """tokens: [...] int64. -> [..., d_model] in dtype; zeros for tokens whose rows lie elsewhere"""
        weight = local_tensor(self.weight)
        if self.vocabulary.size == 1:
            return F.embedding(tokens, weight).to(dtype)
        row = tokens - self.vocabulary.first(self.vocabulary.size * len(weight))
        elsewhere = (row < 0) | (row >= len(weight))
        return F.embedding(row.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0).to(dtype)

    def as_head(self, x: Tensor, score: Callable[[Tensor, Tensor], T]) -> T:
        """Let `score` have x and the rows that lie here; a call of this module, for that is when FSDP gathers them."""
        return score(x, local_tensor(self.weight))
