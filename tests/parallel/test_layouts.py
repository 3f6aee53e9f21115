"""N ranks equal one rank: losses, gradient norms, every gradient, every count."""

from __future__ import annotations

from functools import partialmethod
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from moescale.parallel.ranks import run_ranks
from tests.support.layouts import FAMILIES, GLOBAL_BATCH, SEQ, compare, run_steps

LAYOUTS = [  # ranks, parallel degrees
    (2, {"ep": 2}), (2, {"tp": 2}), (2, {"cp": 2}), (2, {"pp": 2}),
    (4, {}), (4, {"ep": 4}), (4, {"ep": 2, "dp_replicate": 2}), (4, {"tp": 4}),
    (4, {"tp": 2, "ep": 4, "recompute": "full"}), (4, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}),
    (4, {"pp": 2, "tp": 2, "pp_schedule": "interleaved_1f1b"}),
    (4, {"ep": 4, "dispatcher": "hierarchical", "node_ranks": 2, "dispatch_chunks": 2, "recompute": "selective"}),
    (4, {"tp": 2, "ep": 4, "dispatcher": "all_gather", "row_budget": 0.6}),
    (4, {"pp": 2, "cp": 2, "ep": 2, "pp_schedule": "zero_bubble", "recompute": "selective"}),
]
SHARED, CUT, NODES, GATHERED, PIPELINE = (LAYOUTS[index] for index in (8, 9, 11, 12, 13))  # of all degrees something
# groups of experts of which one is busier, each expert cut over both: all gather it as often
SHARDED_BUDGET = (4, {"ep": 2, "row_budget": 0.9})
LAYOUTS_OF = {  # what is not named takes all
    "mixtral": [*LAYOUTS, SHARDED_BUDGET],
    # without experts to spread, which a dense model's configuration refuses, some layouts are the same
    "palm": [(ranks, {key: value for key, value in parallel.items() if key not in ("ep", "etp")})
             for ranks, parallel in (*LAYOUTS[1:5], *LAYOUTS[6:12], LAYOUTS[13])],
    "gshard": [CUT, NODES, PIPELINE], "deepseek": [SHARED, GATHERED, PIPELINE],
    "expert_choice": [CUT, GATHERED, PIPELINE],
    "surest": [(4, {"ep": 2, "recompute": "full"}), CUT, PIPELINE],
    "left_behind": [(2, {"cp": 2}), (2, {"pp": 2})], "sinkhorn": [(2, {"tp": 2, "ep": 2}), PIPELINE],
    "jamba": [CUT, PIPELINE], "mamba": [(4, {"cp": 4})], "mamba2": [CUT],
    "pattern": [CUT, PIPELINE], "windows": [(2, {"cp": 2})], "memories": [CUT], "systems": [CUT],
    "segments": [CUT, (4, {"pp": 2, "cp": 2, "recompute": "full"})],
    "rezero": [SHARED, CUT, (4, {"pp": 2, "cp": 2, "ep": 2, "recompute": "full"})],
}
CASES = [(family, *layout) for family in FAMILIES for layout in LAYOUTS_OF.get(family, LAYOUTS)]
STEPS = 3
TOLERANCES = {"float32": 1e-5, "float64": 1e-10}
COMPUTE = {"rezero": "float64"}  # the gradient of a scalar is a sum that nearly cancels: float32's rounding would show


@pytest.fixture(scope="module")
def one_rank() -> dict:
    return {family: run_ranks(1, run_steps, family, {}, COMPUTE.get(family, "float32"), STEPS)[0]
            for family in FAMILIES}


@pytest.mark.parametrize(("family", "ranks", "parallel"), CASES, ids=str)
def test_layout_equals_one_rank(one_rank: dict, family: str, ranks: int, parallel: dict[str, Any]) -> None:
    compute = COMPUTE.get(family, "float32")
    results = run_ranks(ranks, run_steps, family, parallel, compute, STEPS)
    for key in ("first", "gradients", "biases"):  # a pipeline's ranks hold some of the layers each
        joined = {name: value for result in results for name, value in result[key].items()}
        for result in results:
            result[key] = joined
    for result in results:
        compare(result, one_rank[family], TOLERANCES[compute])


def test_biases_move_once_a_step_by_the_load_of_the_global_batch(one_rank: dict) -> None:
    biases, history = one_rank["deepseek"]["biases"], one_rank["deepseek"]["history"]
    assert len(biases) == 2
    for name, bias in biases.items():
        expected = torch.zeros(8)
        for _, counts in history:
            load = torch.tensor(counts[f"moe/layer_{int(name.split('.')[1]):02d}/tokens_per_expert"])
            assert int(load.sum()) == 3 * (GLOBAL_BATCH * SEQ - 9 - 21)  # without the padding
            expected -= 0.05 * (load - load.double().mean()).sign()
        torch.testing.assert_close(bias, expected)


@pytest.mark.parametrize(("family", "recompute", "backend"), [
    pytest.param("mixtral", "none", "inductor", marks=pytest.mark.slow),  # which makes code, and takes longer
    ("switch", "selective", "aot_eager"),
])
def test_compiled_blocks_change_nothing(one_rank: dict, family: str, recompute: str, backend: str) -> None:
    with mock.patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend)):
        result = run_ranks(1, run_steps, family, {"compile": True, "recompute": recompute}, "float32", STEPS)[0]
    compare(result, one_rank[family], 1e-5)


def test_bfloat16_stays_near_float32(one_rank: dict) -> None:
    expected = [figures[0] for figures, _ in one_rank["mixtral"]["history"]]
    for ranks, parallel in ((1, {}), (2, {"ep": 2}), (4, {"tp": 2, "ep": 2}), (4, {"pp": 2, "cp": 2})):
        result = run_ranks(ranks, run_steps, "mixtral", parallel, "bfloat16", STEPS)[0]
        assert [figures[0] for figures, _ in result["history"]] == pytest.approx(expected, rel=2e-2)
        assert all(gradient.dtype == torch.float32 for gradient in result["gradients"].values())
