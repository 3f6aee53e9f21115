"""A pipeline is cut where the most expensive stage costs least."""

from __future__ import annotations

import itertools

import pytest

from moescale.config import parse_config
from moescale.planner.count import layer_flops_per_token
from moescale.planner.stages import cut_into_stages
from tests.support.groups import in_groups


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("vocab_size", [264, 60000])
def test_no_other_cut_is_better(pp: int, vocab_size: int) -> None:
    config = parse_config({
        **in_groups({"num_layers": 7, "vocab_size": vocab_size, "d_model": 64, "d_ff": 2048,
                  "pattern": [{"channel_mixer": "feed_forward"}, {}, {}]}),
        "moe": {"d_ff": 64}, "parallel": {"pp": pp},
    }, "test")
    layers, head = layer_flops_per_token(config)
    assert len(set(layers)) == 2, "layers of two costs"

    def worst(ends: tuple[int, ...]) -> float:
        costs = [sum(layers[first:end]) for first, end in zip((0, *ends), (*ends, 7), strict=True)]
        costs[-1] += head
        return max(costs)

    stages = cut_into_stages(config)
    assert [index for stage in stages for index in stage] == list(range(7))
    assert all(len(stage) > 0 for stage in stages)
    best = min(worst(ends) for ends in itertools.combinations(range(1, 7), pp - 1))
    assert worst(tuple(stage.stop for stage in stages[:-1])) == best
