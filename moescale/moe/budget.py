"""The row budget: a ceiling on the rows that one rank's experts take at a time, which bounds memory for any routing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moescale.comm.collectives import Group, all_gather
from moescale.moe.routing import Routing, starts


class RowBudget:
    """Cuts a routing into portions when some rank would get more rows than the ceiling.

    share: the ceiling over an even share of `top_k` rows per token. drop: in training, leave out rows beyond it, those
    of least weight per sending rank; otherwise they come in further passes.
    group: the ranks that share the experts, `etp` consecutive ranks each of them; None = one process. All ranks count
    the same numbers, so that all make as many passes.
    replica_groups: groups of ranks that hold the same experts. FSDP gathers these for each pass, so that these ranks
    too must make as many passes as the busiest.
    """

    def __init__(
        self, share: float, top_k: int, drop: bool, group: Group, etp: int = 1, replica_groups: Sequence[Group] = ()
    ) -> None:
        self.share, self.top_k, self.drop, self.group, self.etp = share, top_k, drop, group, etp
        self.replica_groups = replica_groups

    def portions(self, routing: Routing, training: bool) -> list[Routing]:
        """Split a routing into portions within the ceiling, to be computed one after another.

        Unless experts are very busy, that is the routing itself.
        """
        drop = self.drop and training
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        owners = ranks // self.etp
        # Gather from every rank the rows that it sends to each owner, and the rows that it wants.
        rows = routing.tokens_per_expert.view(owners, -1).sum(1)  # [owners]
        mine = torch.cat((rows, rows.new_tensor([self.top_k * len(routing.row)])))
        counts = mine.unsqueeze(0) if self.group is None else all_gather(mine.unsqueeze(0), self.group).flatten(0, 1)
        *by_owner, choices = (list(column) for column in zip(*counts.tolist(), strict=True))
        # The number of passes that the busiest owner needs, here and among the replicas.
        ceiling = math.ceil(self.share * sum(choices) / owners)
        passes = max(-(-sum(loads) // ceiling) for loads in by_owner)
        for replicas in () if drop else self.replica_groups:
            passes = int(all_gather(mine.new_tensor([passes]), replicas).max())
        if passes <= 1:
            return [routing]
        owner = routing.expert // (len(routing.tokens_per_expert) // owners)  # [assignments]
        rank = 0 if self.group is None else dist.get_rank(self.group)
        # Drop: every rank keeps its share of each busy owner's ceiling.
        if drop:
            quota = []
            for loads in by_owner:
                total = sum(loads)
                quota.append(loads[rank] if total <= ceiling else min(loads[rank], ceiling * loads[rank] // total))
            return [routing.select(_heaviest(routing.weight.detach(), owner, rows, quota))]
        # Otherwise number the rows of each owner through all ranks: each pass takes the next `ceiling` of them.
        first = []
        for start, loads in zip(starts(rows.tolist()), by_owner, strict=True):
            first.append(start - sum(loads[:rank]))  # so that this rank's number follows those of the ranks before
        number = torch.arange(len(owner), device=owner.device) - owner.new_tensor(first)[owner]
        return [routing.select(number // ceiling == index) for index in range(passes)]


def _heaviest(weight: Tensor, owner: Tensor, rows: Tensor, quota: list[int]) -> Tensor:
    """Mark the assignments of largest weight, as many per owner as its quota.

    weight: [assignments] float32. owner: [assignments] int64. rows: [owners] int64. quota: by owner.
    -> [assignments] bool
    """
    order = weight.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]  # by owner, then by weight
    start = (rows.cumsum(0) - rows)[owner[order]]
    rank = torch.arange(len(order), device=order.device) - start
    return torch.empty_like(owner, dtype=torch.bool).scatter_(0, order, rank < owner.new_tensor(quota)[owner[order]])
