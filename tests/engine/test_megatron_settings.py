"""What Megatron-Core is told of a run, and what is refused before anything starts; without the package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch

from moescale.config import Config, ConfigError, parse_config
from moescale.engine import packages
from moescale.engine.base import check_engine
from moescale.engine.megatron_settings import model_settings, transformer_settings


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", lambda name: "0.16.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def make_config(ranks: int = 4, **groups: dict[str, Any]) -> Config:
    run = {"engine": "megatron", **groups.pop("run", {})}
    data = {"global_batch": 16, "micro_batch": 2, **groups.pop("data", {})}
    return parse_config({"run": run, "data": data, **groups}, "test").for_world(ranks)


def test_settings_of_a_run() -> None:
    config = make_config(
        model={"d_model": 64, "num_layers": 4, "norm_eps": 1e-6, "tied_embeddings": True},
        attention={"num_heads": 8, "num_kv_heads": 2, "head_dim": 16, "rope_theta": 5e5, "window": 9},
        moe={"router": "sigmoid_bias", "num_experts": 8, "top_k": 4, "d_ff": 24, "num_shared_experts": 2,
             "num_expert_groups": 4, "top_k_groups": 2, "routed_scaling": 2.5, "balance_over": "micro_batch",
             "load_balance_coefficient": 0.02, "router_z_coefficient": 1e-3},
        parallel={"ep": 2, "pp": 2}, precision={"compute": "bfloat16"})
    check_engine(config)
    settings = transformer_settings(config)
    assert {
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 2, "kv_channels": 16,
        "layernorm_epsilon": 1e-6, "normalization": "RMSNorm", "gated_linear_unit": True, "num_moe_experts": 8,
        "moe_ffn_hidden_size": 24, "moe_router_topk": 4, "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True, "moe_router_topk_scaling_factor": 2.5, "moe_router_num_groups": 4,
        "moe_router_group_topk": 2, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.02,
        "moe_z_loss_coeff": 1e-3, "moe_shared_expert_intermediate_size": 48, "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall", "bf16": True,
        "hidden_dropout": 0.0}.items() <= settings.items()
    assert "window_size" not in settings, "windows are part of our mask, which knows documents"
    assert model_settings(config)["share_embeddings_and_output_weights"]
    assert model_settings(config)["rotary_base"] == 5e5


@pytest.mark.parametrize(("groups", "words"), [
    ({"optim": {"name": "adafactor"}}, "optim.name=adafactor .*: write optim.name=adamw, or write run.engine=native"),
    ({"optim": {"moments": "bfloat16"}}, "write optim.moments=float32"),
    ({"moe": {"router": "gshard", "top_k": 2}}, "moe.router=gshard has no counterpart .*: write run.engine=native"),
    ({"moe": {"router": "switch", "top_k": 1, "capacity_factor": 1.25}}, "write moe.capacity_factor=null"),
    ({"moe": {"jitter": 0.01}}, "moe.jitter=0.01 .* write moe.jitter=0"),
    ({"moe": {"balance_over": "global_batch"}}, "write moe.balance_over=micro_batch"),
    ({"model": {"pattern": [{"mixer": "mamba"}]}}, "model.pattern.0 with mixer=mamba .*run.engine=megatron"),
    ({"model": {"residual": "rezero", "norm": "none"}}, "model.residual=rezero"),
    ({"attention": {"dilation": 2}}, "attention.dilation=2 has no counterpart"),
    ({"parallel": {"tp": 2}}, "parallel.tp=2 with mixtures .*: write parallel.tp=1"),
    ({"parallel": {"cp": 2}}, "write parallel.cp=1"),
    ({"parallel": {"dp_replicate": 2}}, "write parallel.dp_replicate=1"),
    ({"parallel": {"recompute": "full"}}, "write parallel.recompute=none"),
    ({"precision": {"reduce": "bfloat16"}}, "write precision.reduce=float32"),
    ({"precision": {"compute": "float64"}}, "write precision.compute=float32 or bfloat16"),
], ids=str)
def test_what_has_no_counterpart_is_named(groups: dict[str, dict[str, Any]], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        check_engine(make_config(**groups))
    assert "\n" not in str(raised.value)


def test_a_dense_model_may_be_cut_by_tp() -> None:
    dense = {"pattern": [{"channel_mixer": "feed_forward"}]}
    check_engine(make_config(model=dense, parallel={"tp": 2}))
    with pytest.raises(ConfigError, match=r"parallel.tp=4 must divide attention.num_kv_heads=2"):
        check_engine(make_config(model=dense, attention={"num_heads": 8, "num_kv_heads": 2}, parallel={"tp": 4}))


def test_packages_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    config = make_config()
    monkeypatch.setattr(packages, "version", missing)
    with pytest.raises(ConfigError, match=r"needs the package megatron-core: pip install 'megatron-core>=0.16"):
        check_engine(config)
    monkeypatch.setattr(packages, "version", lambda name: "0.15.3")
    with pytest.raises(ConfigError, match=r"tested with megatron-core 0.16.1, and 0.15.3 is installed: pip install"):
        check_engine(config)
    monkeypatch.setattr(packages, "version", lambda name: "0.16.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"GPUs alone, and torch sees none here: .* or write run.engine=native"):
        check_engine(config)
