"""N ranks equal one rank: losses, gradient norms, every gradient, every count."""

from __future__ import annotations

import math
from functools import partialmethod
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from moescale.config import Config, parse_config
from moescale.data.batches import Batch
from moescale.engine.native import NativeEngine
from moescale.monitor.routing_metrics import WHOLE, routing_metrics
from moescale.parallel.mesh import start_mesh, stop_mesh, world_size
from moescale.parallel.ranks import run_ranks
from tests.support.groups import in_groups

SEQ, GLOBAL_BATCH, VOCAB = 24, 8, 64
MODEL = {"vocab_size": VOCAB, "d_model": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
FAMILIES = {
    "mixtral": {**in_groups({**MODEL, "window": 7, "init": "fan_in"}),
                "moe": {"num_experts": 8, "top_k": 2, "d_ff": 16, "router_z_coefficient": 1e-3}},
    "switch": {**in_groups({**MODEL, "init": "fan_in", "pattern": [{"channel_mixer": "feed_forward"}, {}]}),
               "moe": {"num_experts": 4, "top_k": 1, "router": "switch", "capacity_factor": 1.0, "d_ff": 16,
                       "jitter": 0.01, "activation": "relu"}},
    "gshard": {**in_groups({**MODEL, "init": "fan_in", "norm": "layernorm", "positions": "alibi"}),
               "moe": {"num_experts": 8, "top_k": 2, "router": "gshard", "capacity_factor": 1.0, "d_ff": 16}},
    "deepseek": {**in_groups({**MODEL, "init": "fan_in", "pattern": [{"channel_mixer": "feed_forward"}, {}]}),
                 "moe": {"num_experts": 8, "top_k": 3, "d_ff": 8, "num_shared_experts": 2, "router": "sigmoid_bias",
                         "num_expert_groups": 4, "top_k_groups": 2, "bias_update_rate": 0.05}},
    "expert_choice": {**in_groups({**MODEL, "init": "fan_in"}),
                      "moe": {"num_experts": 8, "top_k": 2, "router": "expert_choice", "capacity_factor": 1.8,
                              "d_ff": 16, "router_z_coefficient": 1e-3}},
    "surest": {**in_groups({**MODEL, "init": "fan_in"}),
               "moe": {"num_experts": 8, "top_k": 2, "router": "gshard", "capacity_factor": 0.8, "d_ff": 16,
                       "drop_by": "probability", "min_capacity": 2, "eval_capacity_factor": 1.0,
                       "balance_over": "global_batch"}},
    "left_behind": {**in_groups({**MODEL, "init": "fan_in", "pattern": [{"channel_mixer": "feed_forward"}, {}]}),
                    "moe": {"num_experts": 4, "top_k": 1, "router": "switch", "capacity_factor": 0.9, "d_ff": 16,
                            "jitter": 0.01, "left_behind_choices": 3, "balance_over": "micro_batch",
                            "expert_dropout": 0.2}},
    "sinkhorn": {**in_groups({**MODEL, "init": "fan_in", "pattern": [{"channel_mixer": "feed_forward"}, {}]}),
                 "moe": {"num_experts": 8, "top_k": 3, "router": "sinkhorn", "capacity_factor": 1.0, "d_ff": 16,
                         "drop_by": "probability", "balance_over": "global_batch"}},
    "pattern": {**in_groups({**MODEL, "init": "fan_in", "pattern": [
                    {"channel_mixer": "feed_forward", "attention": {"window": 5, "num_heads": 8}},
                    {"attention": {"rope_theta": 100.0}, "moe": {"d_ff": 24}}]}),
                "moe": {"num_experts": 4, "d_ff": 16}},
    "windows": {**in_groups({**MODEL, "init": "fan_in", "pattern": [
                    {"attention": {"window": 3}}, {"attention": {"window": 14, "num_kv_heads": 4}}]}),
                "moe": {"num_experts": 4, "d_ff": 16}},
    "palm": {**in_groups({**MODEL, "init": "fan_in", "block": "parallel", "tied_embeddings": True, "scale_logits": True,
                       "norm": "layernorm", "num_kv_heads": 1, "d_ff": 64, "z_loss_coefficient": 1e-4,
                       "pattern": [{"channel_mixer": "feed_forward"}]})},
}
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
    "pattern": [CUT, PIPELINE], "windows": [(2, {"cp": 2})],
}
CASES = [(family, *layout) for family in FAMILIES for layout in LAYOUTS_OF.get(family, LAYOUTS)]
STEPS = 3
OF_A_LAYOUT = ("surplus", "other_ranks", "other_nodes", "bytes_sent", "rows_between_ranks")


def micro_batch(num_ranks: int) -> int:
    """num_ranks: with batches of their own. -> sequences a pass: two passes where there are enough"""
    return max(2, GLOBAL_BATCH // num_ranks // 2)


def make_config(family: str, parallel: dict[str, Any], compute: str = "float32") -> Config:
    num_ranks = world_size() // math.prod(parallel.get(axis, 1) for axis in ("pp", "cp", "tp"))
    return parse_config({
        **FAMILIES[family], "parallel": parallel, "precision": {"compute": compute},
        "data": {"seq_len": SEQ, "global_batch": GLOBAL_BATCH, "micro_batch": micro_batch(num_ranks),
                 "tokenizer": "none.json"},
        "optim": {"lr": 3e-3, "warmup_steps": 5}, "run": {"steps": 20, "seed": 5},
    }, "test").for_world(world_size())


def make_batches(step: int, rank: int, num_ranks: int) -> list[Batch]:
    """Documents of unequal length, ignored targets, and padding that fills one sequence almost whole."""
    generator = torch.Generator().manual_seed(step)
    tokens = (torch.randn(GLOBAL_BATCH, SEQ, generator=generator).abs() * 20).long().clamp(max=VOCAB - 1)
    targets = torch.cat((tokens[:, 1:], tokens[:, :1]), 1)
    targets[torch.rand(GLOBAL_BATCH, SEQ, generator=generator) < 0.1] = -100
    positions = torch.arange(SEQ).repeat(GLOBAL_BATCH, 1)
    positions[1, 5:] -= 5
    positions[3, 20:] -= 20
    token_id = torch.arange(GLOBAL_BATCH * SEQ).view(GLOBAL_BATCH, SEQ) + step * GLOBAL_BATCH * SEQ
    for row, length in ((2, 15), (7, 3)):
        token_id[row, length:], targets[row, length:], positions[row, length:] = -1, -100, 0
    share = GLOBAL_BATCH // num_ranks
    parts = zip(*(part[rank * share : (rank + 1) * share].split(micro_batch(num_ranks))
                  for part in (tokens, targets, positions, token_id)), strict=True)
    return [Batch(*part) for part in parts]


def run_steps(family: str, parallel: dict[str, Any], compute: str, steps: int) -> dict:
    config = make_config(family, parallel, compute)
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    first = {name: _whole(parameter.data) for name, parameter in engine.model.named_parameters()}
    history, gradients = [], {}
    for step in range(steps):
        losses = engine.forward_backward(make_batches(step, mesh.batch_rank, mesh.batch_size))
        if step == 0:
            gradients = {name: _whole(p.grad) for name, p in engine.model.named_parameters() if p.grad is not None}
        norm = engine.step()
        figures = [float(x) for x in (losses.cross_entropy, losses.load_balance, losses.router_z, norm)]
        counts = routing_metrics(engine.routing())
        history.append((figures, {key: count for key, count in counts.items() if not key.endswith(OF_A_LAYOUT)}))
    biases = {name: buffer.clone() for name, buffer in engine.model.named_buffers() if name.endswith("expert_bias")}
    evaluated = engine.evaluate(make_batches(99, mesh.batch_rank, mesh.batch_size))
    stop_mesh()
    return {"first": first, "gradients": gradients, "history": history, "biases": biases, "evaluated": evaluated}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


@pytest.fixture(scope="module")
def one_rank() -> dict:
    return {family: run_ranks(1, run_steps, family, {}, "float32", STEPS)[0] for family in FAMILIES}


@pytest.mark.parametrize(("family", "ranks", "parallel"), CASES, ids=str)
def test_layout_equals_one_rank(one_rank: dict, family: str, ranks: int, parallel: dict[str, Any]) -> None:
    results = run_ranks(ranks, run_steps, family, parallel, "float32", STEPS)
    for key in ("first", "gradients", "biases"):  # a pipeline's ranks hold some of the layers each
        joined = {name: value for result in results for name, value in result[key].items()}
        for result in results:
            result[key] = joined
    for result in results:
        compare(result, one_rank[family], 1e-5)


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
    ("mixtral", "none", "inductor"), ("switch", "selective", "aot_eager"),  # the second makes no code, and takes less
])
def test_compiled_blocks_change_nothing(one_rank: dict, family: str, recompute: str, backend: str) -> None:
    with mock.patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend)):
        result = run_ranks(1, run_steps, family, {"compile": True, "recompute": recompute}, "float32", STEPS)[0]
    compare(result, one_rank[family], 1e-5)


def compare(result: dict, expected: dict, tolerance: float) -> None:
    assert result["first"].keys() == expected["first"].keys() == result["gradients"].keys()
    for name, weight in expected["first"].items():
        assert torch.equal(result["first"][name], weight), f"{name} starts differently"
        ours, theirs = result["gradients"][name].double(), expected["gradients"][name].double()
        scale = float(ours.norm() / theirs.norm())
        assert scale == pytest.approx(1, abs=tolerance), f"{name}: gradient {scale:.3f} times too large"
        assert float((ours - theirs).norm() / theirs.norm()) < tolerance, f"{name}: gradient differs"
    for step, ((ours, counts), (theirs, expected_counts)) in enumerate(
        zip(result["history"], expected["history"], strict=True)
    ):
        assert ours == pytest.approx(theirs, rel=tolerance), f"step {step}"
        assert counts.keys() == expected_counts.keys()
        for key, count in expected_counts.items():
            equal = count if key.endswith(WHOLE) and "/layer_" in key else pytest.approx(count, rel=tolerance)
            assert counts[key] == equal, f"step {step}: {key}"
    assert result["biases"].keys() == expected["biases"].keys()
    for name, bias in expected["biases"].items():
        assert torch.equal(result["biases"][name], bias), name
    assert result["evaluated"] == pytest.approx(expected["evaluated"], rel=tolerance)


def test_bfloat16_stays_near_float32(one_rank: dict) -> None:
    expected = [figures[0] for figures, _ in one_rank["mixtral"]["history"]]
    for ranks, parallel in ((1, {}), (2, {"ep": 2}), (4, {"tp": 2, "ep": 2}), (4, {"pp": 2, "cp": 2})):
        result = run_ranks(ranks, run_steps, "mixtral", parallel, "bfloat16", STEPS)[0]
        assert [figures[0] for figures, _ in result["history"]] == pytest.approx(expected, rel=2e-2)
        assert all(gradient.dtype == torch.float32 for gradient in result["gradients"].values())
