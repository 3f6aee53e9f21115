"""What a router decides, whatever router it was: a flat list of assignments sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which rows to make of the tokens, and how to weigh them on the way back.

    token: [assignments] int64, the token that each row copies; rows are sorted by expert, then by token.
    weight: [assignments] float32, the row's share of its token's output.
    tokens_per_expert: [experts] int64, sums to assignments.
    row: [tokens, choices] int64, the inverse of token: the row of each choice, -1 = dropped or padding.
    """

    token: Tensor
    weight: Tensor
    tokens_per_expert: Tensor
    row: Tensor


def sort_by_expert(expert: Tensor, weight: Tensor, kept: Tensor, num_experts: int) -> Routing:
    """Make a Routing of each token's choices.

    expert: [tokens, choices] int64. weight: [tokens, choices] float32. kept: [tokens, choices] bool.
    """
    key = torch.where(kept, expert, num_experts).flatten()  # what is not kept sorts to the end
    order = key.argsort(stable=True)
    bounds = torch.arange(num_experts, device=key.device)
    ends = torch.searchsorted(key[order], bounds, right=True)
    assignments = int(ends[-1])
    row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=key.device))
    order = order[:assignments]
    return Routing(
        token=order // expert.shape[1],
        weight=weight.flatten().take(order),
        tokens_per_expert=torch.diff(ends, prepend=ends.new_zeros(1)),
        row=torch.where(row < assignments, row, -1).view_as(expert),
    )
