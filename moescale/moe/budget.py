"""A ceiling of rows that the experts of one rank take at a time: memory is bounded whatever the router does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from moescale.comm.collectives import Group, all_gather
from moescale.moe.routing import Routing


class RowBudget:
    """Cut a routing where some rank would get more rows than the ceiling.

    share: the ceiling over an even share of `top_k` rows a token. drop: in training, rows beyond it are left out, the
    lightest of each rank that sends; otherwise they come in further passes. group: the ranks that share the experts,
    `copies` in a row each of them; None = one process. All ranks count the same, so that they make as many passes.
    twins: groups of ranks, of other such groups, that hold the same experts. These are gathered for each pass, so that
    there too all make as many passes as the busiest.
    """

    def __init__(
        self, share: float, top_k: int, drop: bool, group: Group, copies: int = 1, twins: Sequence[Group] = ()
    ) -> None:
        self.share, self.top_k, self.drop, self.group, self.copies = share, top_k, drop, group, copies
        self.twins = twins

    def portions(self, routing: Routing, training: bool) -> list[Routing]:
        """-> what to compute at a time; the routing itself where it fits, as it does unless experts are very busy"""
        drop = self.drop and training
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        owners = ranks // self.copies
        rows = routing.tokens_per_expert.view(owners, -1).sum(1)  # [owners]
        mine = torch.cat((rows, rows.new_tensor([self.top_k * len(routing.row)])))
        counts = mine.unsqueeze(0) if self.group is None else all_gather(mine.unsqueeze(0), self.group).flatten(0, 1)
        *by_owner, choices = (list(column) for column in zip(*counts.tolist(), strict=True))
        ceiling = math.ceil(self.share * sum(choices) / owners)
        passes = max(-(-sum(loads) // ceiling) for loads in by_owner)
        for twins in () if drop else self.twins:
            passes = int(all_gather(mine.new_tensor([passes]), twins).max())
        if passes <= 1:
            return [routing]
        owner = routing.expert // (len(routing.tokens_per_expert) // owners)  # [assignments]
        rank = 0 if self.group is None else dist.get_rank(self.group)
        if drop:
            quota = [min(loads[rank], ceiling * loads[rank] // max(1, sum(loads))) if sum(loads) > ceiling
                     else loads[rank] for loads in by_owner]
            return [routing.select(_heaviest(routing.weight.detach(), owner, rows, quota))]
        before = [sum(loads[:rank]) for loads in by_owner]  # rows that ranks before this one send to each
        first = [start - already for start, already in zip([0, *accumulate(rows.tolist())], before, strict=False)]
        arrival = torch.arange(len(owner), device=owner.device) - owner.new_tensor(first)[owner]
        return [routing.select(arrival // ceiling == number) for number in range(passes)]


def _heaviest(weight: Tensor, owner: Tensor, rows: Tensor, quota: list[int]) -> Tensor:
    """Of each owner's assignments mark so many of the heaviest. rows, quota: by owner. -> [assignments] bool"""
    order = weight.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]  # by owner, then by weight
    start = (rows.cumsum(0) - rows)[owner[order]]
    place = torch.arange(len(order), device=order.device) - start
    return torch.empty_like(owner, dtype=torch.bool).scatter_(0, order, place < owner.new_tensor(quota)[owner[order]])
