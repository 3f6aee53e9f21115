"""What a router decides, whatever router it was: a flat list of assignments sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from moescale.ops.permute import permute
from moescale.ops.router import rows_by_expert


@dataclass(frozen=True)
class Routing:
    """Which rows to make of the tokens, and how to weigh them on the way back.

    token: [assignments] int64, the token that each row copies; rows are sorted by expert, then by token.
    weight: [assignments] float32, the row's share of its token's output.
    tokens_per_expert: [experts] int64, sums to assignments.
    row: [tokens, choices] int64, the inverse of token: the row of each choice, -1 = dropped or padding.
    token_id: [tokens] int64, the numbers from which a token's random draws come; None where experts draw nothing.
    """

    token: Tensor
    weight: Tensor
    tokens_per_expert: Tensor
    row: Tensor
    token_id: Tensor | None = None

    @property
    def expert(self) -> Tensor:
        """[assignments] int64, the expert of each row."""
        experts = torch.arange(len(self.tokens_per_expert), device=self.token.device)
        return experts.repeat_interleave(self.tokens_per_expert, output_size=len(self.token))

    def select(self, chosen: Tensor) -> Routing:
        """Keep some of the assignments. chosen: [assignments] bool"""
        rows = chosen.nonzero().squeeze(1)
        place = torch.full_like(self.token, -1).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
        none = place.new_full((1,), -1)  # what row -1 takes
        return Routing(
            token=self.token[rows],
            weight=permute(self.weight.unsqueeze(1), rows, place.unsqueeze(1)).squeeze(1),
            tokens_per_expert=self.expert[rows].bincount(minlength=len(self.tokens_per_expert)),
            row=torch.cat((place, none))[self.row],
            token_id=self.token_id,
        )

    def split(self, parts: int) -> list[Routing]:
        """Cut the tokens into consecutive parts, as `tensor_split` does, each with a routing of its own."""
        if parts == 1:
            return [self]
        starts = [0, *accumulate(len(part) for part in self.row.tensor_split(parts))]
        part = torch.bucketize(self.token, torch.tensor(starts[1:], device=self.token.device), right=True)
        return [_from_token(self.select(part == index), *starts[index : index + 2]) for index in range(parts)]


def _from_token(routing: Routing, first: int, last: int) -> Routing:
    """Count tokens from `first` on, up to `last`, where all assignments are."""
    token_id = None if routing.token_id is None else routing.token_id[first:last]
    return Routing(routing.token - first, routing.weight, routing.tokens_per_expert, routing.row[first:last], token_id)


def sort_by_expert(
    expert: Tensor, weight: Tensor, kept: Tensor, num_experts: int, num_kept: int | None = None
) -> Routing:
    """Make a Routing of each token's choices.

    expert: [tokens, choices] int64. weight: [tokens, choices] float32. kept: [tokens, choices] bool; num_kept: how many
    of them, if the host knows that without waiting for the device.
    """
    order, row, counts = rows_by_expert(torch.where(kept, expert, -1), num_experts)
    order = order[: int(counts.sum()) if num_kept is None else num_kept]
    return Routing(order // expert.shape[1], weight.flatten().take(order), counts, row)


def num_valid(token_id: Tensor) -> int:
    """Count the tokens that are not padding; the host waits for the device once for a tensor, not for each layer."""
    known = vars(token_id)
    if "num_valid" not in known:
        known["num_valid"] = int((token_id >= 0).sum())
    return int(known["num_valid"])
