"""The configurations that ship build, and have the papers' sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from moescale.config import ConfigError, load_config, parse_config
from moescale.model.build import build_model
from moescale.planner.count import count_parameters, model_flops_per_token

CONFIGS = Path(__file__).parent.parent / "configs"
BILLIONS = {  # total and active as published, and how far the published digits reach
    "mixtral_8x7b": (46.7, 12.9, 0.05), "mixtral_8x22b": (141, 39, 0.5), "palm_8b": (8.63, 8.63, 0.01),
    "palm_540b": (540.35, 540.35, 0.01), "switch_base": (7.4, None, 0.05), "gshard_600b": (600, None, 20),
    "jamba_52b": (51.57, 12.11, 0.01), "mamba_130m": (0.129, 0.129, 0.0005),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_builds_and_is_counted_right(path: Path) -> None:
    config = load_config(path)
    model, count = build_model(config, "meta"), count_parameters(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count.total
    assert all(parameter.is_meta for parameter in model.parameters())
    total, active, reach = BILLIONS.get(path.stem, (None, None, None))
    for published, counted in ((total, count.total), (active, count.active)):
        if published is not None:
            assert counted / 1e9 == pytest.approx(published, abs=reach)


def test_shared_experts_are_counted() -> None:
    config = parse_config({"moe": {"num_shared_experts": 3, "activation": "gelu"}}, "test")
    count = count_parameters(config)
    assert sum(parameter.numel() for parameter in build_model(config, "meta").parameters()) == count.total
    expert = 2 * config.model.d_model * config.moe.d_ff * config.model.num_layers
    assert count.total - count.active == (config.moe.num_experts - config.moe.top_k) * expert


@pytest.mark.parametrize(("moe", "message"), [
    ({"router": "sigmoid_bias", "capacity_factor": 1.0},
     "moe.router=sigmoid_bias drops nothing: write moe.capacity_factor=null, or moe.router=switch, gshard or "
     "sinkhorn"),
    ({"drop_by": "probability"},
     "moe.drop_by=probability means nothing to moe.router=mixtral: write moe.drop_by=position, or moe.router=switch, "
     "gshard or sinkhorn"),
    ({"router": "gshard", "eval_capacity_factor": 2.0},
     "moe.eval_capacity_factor=2.0 means nothing without a capacity: write moe.eval_capacity_factor=null, or e.g. "
     "moe.capacity_factor=1.25"),
    ({"router": "expert_choice", "capacity_factor": 2.0, "balance_over": "global_batch"},
     "moe.balance_over=global_batch means nothing to moe.router=expert_choice: write moe.balance_over=sequence, or "
     "moe.router=mixtral, sigmoid_bias, switch, gshard or sinkhorn"),
    ({"router": "switch", "top_k": 1, "capacity_factor": 1.0, "left_behind_choices": 9},
     "moe.left_behind_choices=9 must be at most moe.num_experts=8"),
    ({"balance_over": "micro_batch"},
     "moe.balance_over=micro_batch needs sequences that are the same in every layout: write e.g. data.micro_batch=1, "
     "or moe.balance_over=global_batch"),
    ({"routed_scaling": 2.5},
     "moe.routed_scaling=2.5 means nothing to moe.router=mixtral: write moe.routed_scaling=1.0, or "
     "moe.router=sigmoid_bias"),
    ({"router": "sigmoid_bias", "num_expert_groups": 3},
     "moe.num_expert_groups=3 must divide moe.num_experts=8: use 1, 2, 4 or 8"),
    ({"router": "sigmoid_bias", "top_k_groups": 2}, "moe.top_k_groups=2 must be at most moe.num_expert_groups=1"),
    ({"router": "sigmoid_bias", "top_k": 5, "num_expert_groups": 4},
     "moe.top_k=5 is more than the 2 experts of moe.top_k_groups=1 of moe.num_expert_groups=4: write "
     "moe.top_k_groups=3"),
    ({"router": "expert_choice"},
     "moe.router=expert_choice needs the number of experts that a token has on average: write e.g. "
     "moe.capacity_factor=2.0"),
    ({"router": "expert_choice", "capacity_factor": 3.2},
     "moe.router=expert_choice with moe.capacity_factor=3.2 gives a token about 3 experts in evaluation: write "
     "moe.top_k=3 instead of 2"),
])
def test_what_a_router_cannot_do_is_refused(moe: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config({"moe": moe}, "test")
    assert str(error.value) == f"test: {message}"


def test_palm_utilisation_is_the_papers() -> None:
    """238.3 thousand tokens a second on 6144 chips of 275 TFLOP/s are 46.2 % (PaLM, table 3)."""
    flops = model_flops_per_token(load_config(CONFIGS / "palm_540b.yaml"))
    assert 238.3e3 * flops / (6144 * 275e12) == pytest.approx(0.462, abs=0.001)
