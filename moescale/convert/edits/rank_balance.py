"""Which experts share a rank: as many on each, with loads as equal as can be."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moescale.config import Config, ConfigError

FILE = "placement.json"


@dataclass(frozen=True)
class RankBalance:
    """How experts are renumbered, and what that does to the ranks' loads.

    orders: old number of each new expert, by layer. before, after: rows of each rank, by layer.
    """

    orders: Mapping[int, Sequence[int]]
    before: Mapping[int, Sequence[int]]
    after: Mapping[int, Sequence[int]]

    def to_json(self) -> str:
        return json.dumps({"layers": {str(layer): {
            "old_number": list(order), "rank_load_before": list(self.before[layer]),
            "rank_load_after": list(self.after[layer])} for layer, order in self.orders.items()}}, indent=1)


def balance_ranks(loads: Mapping[int, Sequence[int]], config: Config, ep: int) -> RankBalance:
    """Renumber each layer's experts so that `ep` blocks of them have equal loads. Groups of experts stay groups.

    loads: rows of each expert, by layer. Raises ConfigError.
    """
    experts, groups = config.moe.num_experts, config.moe.num_expert_groups
    if experts % ep:
        raise ConfigError(f"--place-experts {ep} must divide moe.num_experts={experts}")
    if groups % ep and ep % groups:
        raise ConfigError(f"--place-experts {ep} cuts through groups: it must divide moe.num_expert_groups={groups} or "
                          "be a multiple of it")
    orders = {layer: _order(counts, groups, ep) for layer, counts in loads.items()}
    return RankBalance(
        orders,
        {layer: _blocks(counts, ep) for layer, counts in loads.items()},
        {layer: _blocks([loads[layer][old] for old in order], ep) for layer, order in orders.items()},
    )


def _order(counts: Sequence[int], groups: int, ep: int) -> list[int]:
    size = len(counts) // groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(groups)]
    if ep <= groups:  # a rank has whole groups
        totals = [sum(counts[expert] for expert in group) for group in members]
        return [expert for block in balance(totals, ep) for group in block for expert in members[group]]
    return [group[index] for group in members  # a group has whole ranks
            for block in balance([counts[expert] for expert in group], ep // groups) for index in block]


def _blocks(counts: Sequence[int], ep: int) -> list[int]:
    size = len(counts) // ep
    return [sum(counts[block * size : (block + 1) * size]) for block in range(ep)]


def balance(loads: Sequence[int], blocks: int) -> list[list[int]]:
    """Share items out to blocks of equal count: the largest first, each to the lightest block that is not full.

    Then any two blocks, the heaviest being one of them, exchange an item each for as long as that makes it lighter.
    A sharing that is no better than the given order leaves that order. Returns the items of each block, in order.
    """
    size = len(loads) // blocks
    given = [list(range(block * size, (block + 1) * size)) for block in range(blocks)]
    shared: list[list[int]] = [[] for _ in range(blocks)]
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        with_space = [block for block in shared if len(block) < size]
        min(with_space, key=lambda block: sum(loads[other] for other in block)).append(item)
    while _exchange(shared, loads):
        pass
    best = min((given, shared), key=lambda found: max(sum(loads[item] for item in block) for block in found))
    return [sorted(block) for block in best]


def _exchange(blocks: list[list[int]], loads: Sequence[int]) -> bool:
    """Make the heaviest block lighter by the best exchange of two items, and say whether there was one."""
    totals = [sum(loads[item] for item in block) for block in blocks]
    heavy = max(range(len(blocks)), key=totals.__getitem__)
    best, found = totals[heavy], None
    others = [other for other in range(len(blocks)) if other != heavy]
    for other, ours in itertools.product(others, range(len(blocks[heavy]))):
        for theirs, item in enumerate(blocks[other]):
            moved = loads[blocks[heavy][ours]] - loads[item]
            heavier = max(totals[heavy] - moved, totals[other] + moved)
            if moved > 0 and heavier < best:
                best, found = heavier, (other, ours, theirs)
    if found is None:
        return False
    other, ours, theirs = found
    blocks[heavy][ours], blocks[other][theirs] = blocks[other][theirs], blocks[heavy][ours]
    return True
