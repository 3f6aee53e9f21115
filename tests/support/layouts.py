"""Small models of every family, and a few steps of them in a layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moescale.config import Config, parse_config
from moescale.data.batches import Batch
from moescale.engine.native import NativeEngine
from moescale.monitor.routing_metrics import WHOLE, routing_metrics
from moescale.parallel.mesh import start_mesh, stop_mesh, world_size
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
                    {"attention": {"rope_theta": 100.0}, "moe": {"d_ff": 24}},
                    {"channel_mixer": "none"}, {"moe": {"d_ff": 8}}]}),
                "moe": {"num_experts": 4, "d_ff": 16}},
    "memories": {**in_groups({**MODEL, "init": "fan_in", "pattern": [
                     {"mixer": "hippo"}, {"mixer": "lmu"},
                     {"mixer": "hippo", "hippo": {"measure": "legt", "theta": 6.0}}]}),
                 "hippo": {"channels": 4, "d_state": 6}, "lmu": {"memories": 2, "order": 5, "theta": 9.0, "units": 12},
                 "moe": {"num_experts": 4, "d_ff": 16}},
    "systems": {**in_groups({**MODEL, "num_layers": 3, "init": "fan_in", "pattern": [
                    {"mixer": "s4"}, {"mixer": "s4", "s4": {"form": "diagonal", "output": "linear"}},
                    {"mixer": "lssl"}]}),
                "s4": {"d_state": 6}, "lssl": {"d_state": 5, "outputs": 2}, "moe": {"num_experts": 4, "d_ff": 16}},
    "windows": {**in_groups({**MODEL, "init": "fan_in", "pattern": [
                    {"attention": {"window": 3}}, {"attention": {"window": 14, "num_kv_heads": 4}}]}),
                "moe": {"num_experts": 4, "d_ff": 16}},
    "segments": {**in_groups({**MODEL, "num_layers": 2, "init": "fan_in", "block_size": 5, "pattern": [
                     {"attention": {"memory": 4}}, {"attention": {"memory": 12, "positions": "alibi"}}]}),
                 "moe": {"num_experts": 4, "d_ff": 16}},
    "jamba": {**in_groups({**MODEL, "init": "fan_in", "pattern": [
                  {"mixer": "mamba", "channel_mixer": "feed_forward"}, {"channel_mixer": "feed_forward"},
                  {"mixer": "mamba", "mamba": {"inner_norms": True}}, {"mixer": "mamba", "mamba": {"d_conv": 2}}]}),
              "mamba": {"d_state": 4}, "moe": {"num_experts": 4, "d_ff": 16, "normalize_weights": False}},
    "mamba2": {**in_groups({**MODEL, "num_layers": 2, "init": "fan_in", "pattern": [
                   {"mixer": "mamba2"}, {"mixer": "mamba2", "mamba2": {"num_groups": 4}}]}),
               "mamba2": {"d_state": 3, "head_dim": 8}, "moe": {"num_experts": 4, "d_ff": 16}},
    "mamba": {**in_groups({**MODEL, "num_layers": 2, "init": "fan_in", "pattern": [{"mixer": "mamba"}]}),
              "mamba": {"d_state": 3, "expand": 1}, "moe": {"num_experts": 4, "d_ff": 16}},
    "rezero": {**in_groups({**MODEL, "init": "fan_in", "norm": "none", "residual": "rezero", "positions": "none",
                            "embedding_positions": "sinusoidal", "pattern": [{"channel_mixer": "feed_forward"}, {}]}),
               "moe": {"num_experts": 4, "top_k": 2, "d_ff": 16}},
    "palm": {**in_groups({**MODEL, "init": "fan_in", "block": "parallel", "tied_embeddings": True, "scale_logits": True,
                       "norm": "layernorm", "num_kv_heads": 1, "d_ff": 64, "z_loss_coefficient": 1e-4,
                       "pattern": [{"channel_mixer": "feed_forward"}]})},
}
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
    first = {name: whole(parameter.data) for name, parameter in engine.model.named_parameters()}
    history, gradients = [], {}
    for step in range(steps):
        losses = engine.forward_backward(make_batches(step, mesh.batch_rank, mesh.batch_size))
        if step == 0:
            gradients = {name: whole(p.grad) for name, p in engine.model.named_parameters() if p.grad is not None}
        norm = engine.step()
        figures = [float(x) for x in (losses.cross_entropy, losses.load_balance, losses.router_z, norm)]
        counts = routing_metrics(engine.routing())
        history.append((figures, {key: count for key, count in counts.items() if not key.endswith(OF_A_LAYOUT)}))
    biases = {name: buffer.clone() for name, buffer in engine.model.named_buffers() if name.endswith("expert_bias")}
    evaluated = engine.evaluate(make_batches(99, mesh.batch_rank, mesh.batch_size))
    stop_mesh()
    return {"first": first, "gradients": gradients, "history": history, "biases": biases, "evaluated": evaluated}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def compare(result: dict, expected: dict, tolerance: float) -> None:
    assert result["first"].keys() == expected["first"].keys() == result["gradients"].keys()
    for name, weight in expected["first"].items():
        assert torch.equal(result["first"][name], weight), f"{name} starts differently"
        ours, theirs = result["gradients"][name].double(), expected["gradients"][name].double()
        if theirs.eq(0).all():  # ReZero begins so
            assert ours.eq(0).all(), name
            continue
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
