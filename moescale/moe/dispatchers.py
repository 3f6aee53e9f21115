"""Rows out to the experts, rows back and weighed. What combine needs travels in the handle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moescale.moe.routing import Routing
from moescale.ops.collectives import Group, all_to_all, exchange_counts
from moescale.ops.permute import permute, reorder, unpermute


@dataclass(frozen=True)
class Handle:
    """How rows came to this rank: what `combine` undoes.

    order, inverse: [received] int64, from the order of arrival to the order of local experts and back.
    send, receive: rows per rank of the expert group.
    """

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
    """The experts are spread over the ranks of a group, in order; uneven splits, zero rows allowed."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Handle]:
        counts = exchange_counts(routing.tokens_per_expert, self.group)  # [ranks, local_experts]
        ranks, local_experts = counts.shape
        send = routing.tokens_per_expert.view(ranks, local_experts).sum(1).tolist()
        receive = counts.sum(1).tolist()
        rows = all_to_all(permute(x, routing.token, routing.row), send, receive, self.group)  # [received, d_model]
        expert = torch.arange(local_experts, device=x.device).repeat(ranks)
        order = expert.repeat_interleave(counts.flatten(), output_size=sum(receive)).argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        return reorder(rows, order, inverse), counts.sum(0), Handle(order, inverse, send, receive)

    def combine(self, rows: Tensor, routing: Routing, handle: Handle) -> Tensor:
        rows = reorder(rows, handle.inverse, handle.order)
        rows = all_to_all(rows, handle.receive, handle.send, self.group)  # [assignments, d_model]
        return unpermute(rows, routing.weight, routing.token, routing.row)
