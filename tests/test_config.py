"""What cannot work in a world is refused before anything starts, in one line that says what to write instead."""

from __future__ import annotations

from typing import Any

import pytest

from moescale.config import Config, ConfigError, LayerConfig, parse_config
from tests.support.groups import in_groups


def settle(ranks: int, **parallel: Any) -> Config:
    groups: dict[str, dict[str, Any]] = {
        **in_groups({"num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "vocab_size": 264, "d_model": 64}),
        "moe": {"d_ff": 24}, "data": {"seq_len": 48, "global_batch": 16}, "run": {}, "monitor": {},
    }
    groups = {name: {**group, **parallel.pop(name, {})} for name, group in groups.items()}
    return parse_config({**groups, "parallel": parallel}, "test").for_world(ranks)


@pytest.mark.parametrize(("ranks", "parallel", "words"), [
    (6, {"tp": 4}, "parallel.tp=4 is 4 ranks, which must divide the 6 that were started: use 1, 2, 3 or 6"),
    (8, {"tp": 2, "dp_shard": 2}, "parallel.tp=2 x parallel.dp_shard=2 is 4 ranks, but 8 were started: "
                                  "write parallel.dp_shard=4 or -1"),
    (16, {"tp": 16}, "parallel.tp=16 must divide attention.num_heads=8: use 1, 2, 4 or 8"),
    (4, {"tp": 4, **in_groups({"num_heads": 12, "num_kv_heads": 6})},
     "parallel.tp=4 must divide attention.num_kv_heads=6 or be a multiple of it: use 1, 2 or 3"),
    (4, {"ep": 3}, "parallel.ep=3 must divide moe.num_experts=8: use 1, 2 or 4"),
    (6, {"ep": 2, "etp": 2}, "parallel.etp=2"),
    (4, {"ep": 4, "etp": 2}, "parallel.ep=4 x parallel.etp=2 must divide dp_shard x cp x tp=4"),
    (8, {"ep": 8, "dispatcher": "hierarchical", "node_ranks": 3},
     "parallel.dispatcher=hierarchical with 3 ranks a node cannot share out the 8 ranks of parallel.ep=8 x "
     "parallel.etp=1: write parallel.node_ranks=1, 2, 4 or 8, or parallel.dispatcher=all_to_all"),
    (8, {"ep": 4, "etp": 2, "dispatcher": "hierarchical", "node_ranks": 1}, "write parallel.node_ranks=2, 4 or 8"),
    (1, {"over_budget": "drop"}, "parallel.over_budget=drop drops rows beyond parallel.row_budget: write e.g. "
                                 "parallel.row_budget=1.5"),
    (5, {"etp": 5, "data": {"global_batch": 5}}, "parallel.etp=5 must divide moe.d_ff=24 and dp_shard x cp x tp=5"),
    (4, {"cp": 4, "data": {"seq_len": 44}}, "data.seq_len=44 must be a multiple of 8 for parallel.cp=4 and "
                                            "parallel.tp=1: use 48"),
    (8, {"pp": 8}, "model.num_layers=4: use parallel.pp=4 or less"),
    (4, {"pp": 4, "pp_schedule": "zero_bubble"}, "8 stages of at least one layer"),
    (4, {"pp": 4, "data": {"micro_batch": 8}}, "parallel.pp_schedule=1f1b needs at least parallel.pp=4 micro-batches"),
    (2, {"pp": 2, "pp_schedule": "interleaved_1f1b", "data": {"global_batch": 5, "micro_batch": 1}}, "in 2 rounds"),
    (2, {"pp": 2, "pp_schedule": "zero_bubble", "data": {"global_batch": 5, "micro_batch": 1}}, "in 2 rounds"),
    (2, {"pp": 2, "pp_schedule": "zero_bubble", "compile": True}, "write 1f1b"),
    (2, {"pp": 2, "pp_schedule": "zero_bubble", "model": {"residual": "rezero", "norm": "none"}}, "write 1f1b"),
    (2, {"row_budget": 1.5, "over_budget": "drop", "moe": {"router": "sigmoid_bias"}}, "parallel.over_budget=passes"),
    (1, {"moe": {"top_k": 1, "load_balance_coefficient": 0}}, "no loss trains the router"),
    (2, {"data": {"batch_schedule": [[9, 32], [20, 17]]}}, "a step of 17 must be a multiple of the 2 ranks that share"),
    (3, {"model": {"d_model": 72}}, "data.global_batch=16 must be a multiple of the 3 ranks that share it: use 18"),
])
def test_refused_in_one_line(ranks: int, parallel: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settle(ranks, **parallel)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_left_to_derive() -> None:
    settled = settle(8, tp=2, pp=2)
    assert settled.parallel.dp_shard == 2
    assert settled.data.micro_batch == 4, "the largest that fills a pipeline of two"
    assert settle(2).data.micro_batch == 8, "a rank's whole share"
    assert settle(4, data={"micro_batch": 8}).data.micro_batch == 4, "a file that suits two ranks suits four"
    with pytest.raises(ConfigError, match=r"data\.micro_batch=8"):
        settle(4, data={"micro_batch": 8}, moe={"balance_over": "micro_batch"})


@pytest.mark.parametrize("group", [field.annotation for field in Config.model_fields.values()] + [LayerConfig])
def test_every_key_has_a_sentence(group: Any) -> None:
    sentences = group.sentences()
    for key in group.model_fields:
        text = sentences.get(key, "")
        assert text[:1].isupper() or text.startswith("`"), f"{group.__name__}.{key} needs a sentence below it"
        assert text.endswith("."), f"{group.__name__}.{key}"
        assert "\n" not in text, f"{group.__name__}.{key}: one line"
