"""Matrices and how they start. A weight is float32; it is cast to the dtype of what it meets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescale.comm.collectives import local_tensor
from moescale.ops.product import linear

T = TypeVar("T")
Fill = Callable[[Tensor, torch.Generator], object]
"""Fills a tensor in place. Each module says in `initial` how each of its own parameters starts."""


def ones(tensor: Tensor, generator: torch.Generator) -> object:
    return tensor.fill_(1)


def normal(std: float) -> Fill:
    return lambda tensor, generator: tensor.normal_(0, std, generator=generator)


def truncated_normal(std: float) -> Fill:
    """A normal cut at two of its standard deviations (Switch Transformers, sec. 2.4)."""
    return lambda tensor, generator: nn.init.trunc_normal_(tensor, 0, std, -2 * std, 2 * std, generator=generator)


def matrix_fill(init: str, fan_in: int) -> Fill:
    """How a matrix of `fan_in` input features starts under `model.init`."""
    if init == "normal":
        return normal(0.02)
    if init == "fan_in":
        return normal(fan_in**-0.5)  # PaLM, sec. 2
    return truncated_normal(math.sqrt(0.1 / fan_in))  # a tenth of the usual variance (Switch Transformers, table 3)


class Linear(nn.Module):
    """Multiply by a matrix, without bias. weight: [d_out, d_in]"""

    def __init__(self, d_in: int, d_out: int, init: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.initial = {"weight": matrix_fill(init, d_in)}
        self.rows = slice(None)  # of those of the weight that lie here, which to use

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_in]. -> [..., d_out] in the dtype of x"""
        weight = local_tensor(self.weight)
        if self.rows != slice(None):  # or the gradient would be a copy
            weight = weight[self.rows]
        return linear(x, weight.to(x.dtype))


class Embedding(nn.Module):
    """Look up one row a token. weight: [vocab, d_model]"""

    def __init__(self, vocab_size: int, d_model: int, init: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.initial = {"weight": normal(0.02 if init == "normal" else 1.0)}
        self.first_token: int | None = None  # of those whose rows lie here, where the vocabulary is cut

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """tokens: [...] int64. -> [..., d_model] in dtype; zeros for tokens whose rows lie elsewhere"""
        weight = local_tensor(self.weight)
        if self.first_token is None:
            return F.embedding(tokens, weight).to(dtype)
        row = tokens - self.first_token
        elsewhere = (row < 0) | (row >= len(weight))
        return F.embedding(row.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0).to(dtype)

    def as_head(self, x: Tensor, score: Callable[[Tensor, Tensor], T]) -> T:
        """Let `score` have x and the rows that lie here; a call of this module, for that is when FSDP gathers them."""
        return score(x, local_tensor(self.weight))
