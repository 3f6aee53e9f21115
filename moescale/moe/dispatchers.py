"""Rows out to the experts, rows back and weighed. What combine needs travels in the handle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moescale.moe.routing import Routing
from moescale.ops.collectives import Group, all_to_all, exchange_counts
from moescale.ops.permute import permute, reorder, unpermute


@dataclass(frozen=True)
class Handle:
    """How rows came to this rank: what `combine` undoes.

    routing: of the rows that were sent. order, inverse: [received] int64, from the order of arrival to the order of
    local experts and back. send, receive: rows per rank of the expert group.
    """

    routing: Routing
    order: Tensor
    inverse: Tensor
    send: list[int]
    receive: list[int]


class Dispatcher(Protocol):
    """Two calls do all communication of a mixture of experts."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Any]:
        """x: [tokens, d_model]. -> rows: [received, d_model]; tokens_per_expert: [local_experts]; the handle"""

    def combine(self, rows: Tensor, routing: Routing, handle: Any) -> Tensor:
        """rows: [received, d_model]. -> [tokens, d_model]"""


class LocalDispatcher:
    """All experts are on this rank."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, None]:
        return permute(x, routing.token, routing.row), routing.tokens_per_expert, None

    def combine(self, rows: Tensor, routing: Routing, handle: None) -> Tensor:
        return unpermute(rows, routing.weight, routing.token, routing.row)


class AllToAllDispatcher:
    """The experts are spread over the ranks of a group, in order; uneven splits, zero rows allowed.

    With `copies` above one, as many ranks in a row share each expert's hidden features: every row goes to all of them,
    and combine adds up what they answer.
    """

    def __init__(self, group: Group, copies: int = 1) -> None:
        self.group, self.copies = group, copies

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Handle]:
        owners = dist.get_world_size(self.group) // self.copies
        by_owner = routing.tokens_per_expert.view(owners, -1)  # [ep, local_experts]
        send = by_owner.sum(1).repeat_interleave(self.copies).tolist()
        counts = exchange_counts(by_owner.repeat_interleave(self.copies, 0).flatten(), self.group)
        ranks, local_experts = counts.shape
        receive = counts.sum(1).tolist()
        if self.copies > 1:
            routing = _repeat(routing, by_owner.sum(1), self.copies)
        rows = all_to_all(permute(x, routing.token, routing.row), send, receive, self.group)  # [received, d_model]
        expert = torch.arange(local_experts, device=x.device).repeat(ranks)
        order = expert.repeat_interleave(counts.flatten(), output_size=sum(receive)).argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        return reorder(rows, order, inverse), counts.sum(0), Handle(routing, order, inverse, send, receive)

    def combine(self, rows: Tensor, routing: Routing, handle: Handle) -> Tensor:
        rows = reorder(rows, handle.inverse, handle.order)
        rows = all_to_all(rows, handle.receive, handle.send, self.group)  # [assignments x copies, d_model]
        return unpermute(rows, handle.routing.weight, handle.routing.token, handle.routing.row)


def _repeat(routing: Routing, rows_per_owner: Tensor, copies: int) -> Routing:
    """Send each owner's rows to all ranks that share its experts: `copies` times, one block behind the other."""
    ends = rows_per_owner.cumsum(0)
    assignment = torch.arange(len(routing.token), device=ends.device)
    owner = torch.searchsorted(ends, assignment, right=True)  # [assignments]
    before = (ends - rows_per_owner)[owner]  # rows of earlier owners
    copy = torch.arange(copies, device=ends.device)
    row = before.unsqueeze(1) * (copies - 1) + assignment.unsqueeze(1) + rows_per_owner[owner].unsqueeze(1) * copy
    origin = torch.empty_like(row.flatten()).scatter_(0, row.flatten(), assignment.repeat_interleave(copies))
    no_row = row.new_full((1, copies), -1)
    return Routing(
        token=routing.token[origin],
        weight=permute(routing.weight.unsqueeze(1), origin, row).squeeze(1),
        tokens_per_expert=routing.tokens_per_expert * copies,
        row=torch.cat((row, no_row))[routing.row].flatten(1),  # [tokens, choices x copies]; -1 takes the last
    )
