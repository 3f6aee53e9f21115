"""Fewer or more ranks than a layout was written for: another one by a stated rule, and the same mathematics."""

from __future__ import annotations

from typing import Any

import pytest

from moescale.config import Config, ConfigError, parse_config
from tests.support.groups import in_groups


def settle(ranks: int, data: dict[str, Any] | None = None, **parallel: Any) -> Config:
    groups = in_groups({"num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 264, "d_model": 96})
    return parse_config({
        **groups, "moe": {"num_experts": 8, "d_ff": 24}, "data": {"seq_len": 48, "global_batch": 24, **(data or {})},
        "parallel": {"elastic": True, **parallel},
    }, "test").for_world(ranks)


def layout(config: Config) -> dict[str, int]:
    keys = ("tp", "pp", "cp", "etp", "ep", "dp_shard", "dp_replicate")
    return {key: degree for key in keys if (degree := getattr(config.parallel, key)) > 1}


@pytest.mark.parametrize(("ranks", "parallel", "expected"), [
    (4, {"tp": 2, "pp": 2}, {"tp": 2, "pp": 2}),  # it fits as it is written
    (8, {"tp": 2, "dp_shard": 2}, {"tp": 2, "dp_shard": 4}),  # more ranks share the model
    (2, {"tp": 2, "pp": 2}, {"tp": 2}),
    (2, {"pp": 2, "cp": 2}, {"pp": 2}),
    (2, {"ep": 4}, {"ep": 2, "dp_shard": 2}),
    (4, {"ep": 2, "dp_replicate": 2, "dp_shard": 4}, {"ep": 2, "dp_shard": 4}),  # copies are given up first
    (6, {"ep": 4, "tp": 2, "dp_shard": 4}, {"tp": 2, "ep": 2, "dp_shard": 3}),
    (1, {"ep": 4, "tp": 2, "pp": 2, "dp_shard": 2}, {}),
    (3, {"tp": 2, "dispatcher": "hierarchical", "node_ranks": 2}, {"dp_shard": 3}),
], ids=str)
def test_degrees_fall_in_the_stated_order(ranks: int, parallel: dict[str, Any], expected: dict[str, int]) -> None:
    assert layout(settle(ranks, **parallel)) == expected


def test_micro_batches_fall_where_they_are_no_part_of_the_mathematics() -> None:
    assert settle(4, {"micro_batch": 6}, dp_shard=4).data.micro_batch == 6
    assert settle(3, {"micro_batch": 6}, dp_shard=4).data.micro_batch == 4  # a share of 8
    with pytest.raises(ConfigError, match="no layout with smaller degrees fits the 5 ranks"):
        settle(5, dp_shard=4)
    with pytest.raises(ConfigError, match=r"parallel\.over_budget=passes"):
        settle(2, dp_shard=4, row_budget=1.5, over_budget="drop")
    with pytest.raises(ConfigError, match=r"parallel\.dp_shard=2 or -1"):
        settle(2, dp_shard=4, elastic=False)
