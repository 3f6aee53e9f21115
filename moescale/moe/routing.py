"""The decision of any router: a flat list of assignments sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from moescale.ops.permute import permute
from moescale.ops.router import rows_by_expert


@dataclass(frozen=True)
class Routing:
    """Which tokens go to which experts, and with what weight their outputs come back.

    token: [assignments] int64, the token that each row copies; rows are sorted by expert, then by token.
    weight: [assignments] float32, the row's share of its token's output.
    tokens_per_expert: [experts] int64, sums to assignments.
    row: [tokens, choices] int64, the inverse of token: the row of each choice, -1 = dropped or padding.
    token_id: [tokens] int64, from which a token's random draws come; None when experts draw nothing.
    """

    token: Tensor
    weight: Tensor
    tokens_per_expert: Tensor
    row: Tensor
    token_id: Tensor | None = None

    @property
    def expert(self) -> Tensor:
        """The expert of each row, [assignments] int64."""
        experts = torch.arange(len(self.tokens_per_expert), device=self.token.device)
        return experts.repeat_interleave(self.tokens_per_expert, output_size=len(self.token))

    def select(self, chosen: Tensor) -> Routing:
        """Keep some of the assignments. chosen: [assignments] bool"""
        rows = chosen.nonzero().squeeze(1)
        # The new row of each old one, -1 = left out. A last element makes row -1, which indexes it, stay -1.
        new_row = torch.full_like(self.token, -1).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
        none = new_row.new_full((1,), -1)
        return Routing(
            token=self.token[rows],
            weight=permute(self.weight.unsqueeze(1), rows, new_row.unsqueeze(1)).squeeze(1),
            tokens_per_expert=self.expert[rows].bincount(minlength=len(self.tokens_per_expert)),
            row=torch.cat((new_row, none))[self.row],
            token_id=self.token_id,
        )

    def split(self, parts: int) -> list[Routing]:
        """Cut the tokens into consecutive parts, as `tensor_split` does, each with a routing of its own."""
        if parts == 1:
            return [self]
        bounds = [0, *accumulate(len(part) for part in self.row.tensor_split(parts))]
        part = torch.bucketize(self.token, torch.tensor(bounds[1:], device=self.token.device), right=True)
        routings = []
        for index, (first, last) in enumerate(pairwise(bounds)):
            routings.append(_renumber_tokens(self.select(part == index), first, last))
        return routings


def starts(sizes: Sequence[int]) -> list[int]:
    """Count where each of some consecutive blocks begins."""
    return [0, *accumulate(sizes)][:-1]


def _renumber_tokens(routing: Routing, first: int, last: int) -> Routing:
    """Count tokens from `first` on. All assignments must belong to tokens before `last`."""
    token_id = None if routing.token_id is None else routing.token_id[first:last]
    return Routing(routing.token - first, routing.weight, routing.tokens_per_expert, routing.row[first:last], token_id)


def sort_by_expert(
    expert: Tensor, weight: Tensor, kept: Tensor, num_experts: int, num_kept: int | None = None
) -> Routing:
    """Make a Routing of each token's choices.

    expert: [tokens, choices] int64. weight: [tokens, choices] float32. kept: [tokens, choices] bool.
    num_kept: the number of kept choices, if the host knows it without waiting for the device.
    """
    order, row, counts = rows_by_expert(torch.where(kept, expert, -1), num_experts)
    order = order[: int(counts.sum()) if num_kept is None else num_kept]
    return Routing(order // expert.shape[1], weight.flatten().take(order), counts, row)


def num_valid(whole: Tensor, own: Tensor) -> int:
    """Count this rank's tokens that are not padding; the host waits for the device once a micro-batch.

    whole: [batch, seq] int64, token ids, the same tensor in every layer, which keeps the count. own: of those here.
    """
    known = vars(whole)
    if "num_valid" not in known:
        known["num_valid"] = int((own >= 0).sum())
    return int(known["num_valid"])
