"""Another layout where the one that was written does not fit the ranks that were started.

The rule: a layout that fits as it is written is taken. Otherwise each degree may fall to a divisor of
what was written, and `dp_shard` is whatever is left. Of all layouts that fit, the one is taken that
keeps the first of these as large as it can be, then the second, and so on: `tp`, `pp`, `cp`, `etp`,
`ep`, `dp_shard`, `dp_replicate`. So copies of the model are given up first, and what lets the model
fit into memory last. `micro_batch` falls to the next number that divides a rank's share.

The mathematics stays: the global batch is the same sequences, sums run over all of its tokens and are
divided by one count. What would tie it to the layout is refused.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from moescale.config.layout import settle
from moescale.errors import ConfigError, factors, refuse

if TYPE_CHECKING:
    from moescale.config.run import Config

ORDER = ("tp", "pp", "cp", "etp", "ep")


def settle_elastic(config: Config, world_size: int, node_ranks: int | None) -> Config:
    """Settle a layout for these ranks by the rule above. Raises ConfigError where none fits."""
    refuse(config.parallel.over_budget == "drop",
           "parallel.elastic=true keeps what is computed, and which rows parallel.over_budget=drop drops "
           "depends on the layout: write parallel.over_budget=passes")
    try:
        return settle(config, world_size, node_ranks)
    except ConfigError as error:
        problem = error
    for candidate in _candidates(config, world_size):
        try:
            return settle(candidate, world_size, node_ranks)
        except ConfigError:
            continue
    raise ConfigError(f"no layout with smaller degrees fits the {world_size} ranks that were started "
                      f"either; as it is written: {problem}")


def _candidates(config: Config, world_size: int) -> list[Config]:
    """List the layouts with degrees that divide those that were written, the best one first."""
    parallel = config.parallel
    choices = [factors(getattr(parallel, key)) for key in (*ORDER, "dp_replicate")]
    layouts = []
    for *degrees, dp_replicate in itertools.product(*choices):
        found = dict(zip(ORDER, degrees, strict=True))
        fixed = found["tp"] * found["pp"] * found["cp"] * dp_replicate
        if world_size % fixed == 0:
            dp_shard = world_size // fixed
            kept = dp_shard if parallel.dp_shard == -1 else min(dp_shard, parallel.dp_shard)
            layouts.append(((*degrees, kept, dp_replicate), {
                **found, "dp_shard": dp_shard, "dp_replicate": dp_replicate, "node_ranks": None}))
    layouts.sort(key=lambda layout: layout[0], reverse=True)
    return [config.model_copy(update={
        "parallel": parallel.model_copy(update=layout),
        "data": config.data.model_copy(update={"micro_batch": _micro_batch(config, layout)}),
    }) for _, layout in layouts]


def _micro_batch(config: Config, layout: dict[str, int | None]) -> int | None:
    """Choose the largest micro-batch up to the written one that divides the share of a rank."""
    written = config.data.micro_batch
    ranks = (layout["dp_replicate"] or 1) * (layout["dp_shard"] or 1)
    share = math.gcd(*config.data.batches) // ranks
    if written is None or share == 0 or config.moe.balance_over == "micro_batch":
        return written  # of which the balance loss is a part
    return max(number for number in factors(share) if number <= written)
