"""Megatron's arguments: all are known, what changes the model is read or refused, and losses keep their meaning.

`megatron/arguments.json` lists those of three versions with their defaults; `megatron/arguments.py` wrote it.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from moescale.config import Config, ConfigError
from moescale.convert.formats.megatron.arguments import HARMLESS, HARMLESS_FAMILIES, NEUTRAL, READ
from moescale.convert.formats.megatron.names import read_arguments, write_arguments
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.run import convert, open_source
from moescale.model.build import build_model
from tests.support.models import make_config, write_run

VERSIONS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "megatron/arguments.json").read_text())
SIGMOID = {"router": "sigmoid_bias", "top_k": 3, "num_shared_experts": 1, "num_expert_groups": 4, "top_k_groups": 2}
SWITCH = {"router": "switch", "top_k": 1}
MODELS = {"mixtral": {}, "sigmoid": SIGMOID, "switch": SWITCH}


def stored(moe: dict[str, Any] | None = None, **changes: Any) -> Namespace:
    """What a training run would have stored, with some arguments changed."""
    return Namespace(**{**vars(write_arguments(make_config({"window": None}, moe), FileLayout())), **changes})


def read(args: Namespace) -> Config:
    return read_arguments(args, "there")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_argument_is_known(version: str) -> None:
    known = READ | HARMLESS | NEUTRAL.keys()
    assert not [name for name in VERSIONS[version] if name not in known and not name.startswith(HARMLESS_FAMILIES)]
    assert not READ & HARMLESS
    assert not NEUTRAL.keys() & (READ | HARMLESS)
    assert not [name for name in (*READ, *NEUTRAL) if name.startswith(HARMLESS_FAMILIES)]


@pytest.mark.parametrize("version", VERSIONS)
def test_defaults_change_nothing(version: str) -> None:
    """But for those that every such model sets, which are in the arguments of one."""
    defaults = {name: value for name, value in VERSIONS[version].items()
                if name not in READ | {"add_bias_linear", "activation_func", "multi_latent_attention"}}
    assert read(Namespace(**{**defaults, **vars(stored())})) == read(stored())


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_another_value_than_the_neutral_one_is_refused(name: str) -> None:
    for value in (True, 0.5, 4, "other", [0, 1]):
        if value not in NEUTRAL[name]:
            with pytest.raises(ConfigError, match=f"there: {name}="):
                read(stored(**{name: value}))
    for value in (None, *NEUTRAL[name]):
        assert read(stored(**{name: value})) == read(stored())


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"moe_router_load_balancing_type": "sinkhorn"}), ("mixtral", {"moe_expert_capacity_factor": 1.0}),
    ("mixtral", {"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]}), ("mixtral", {"window_size": 5}),
    ("mixtral", {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.1]}),
    ("mixtral", {"moe_router_topk_scaling_factor": 2.5}),
    ("mixtral", {"moe_router_num_groups": 4, "moe_router_group_topk": 2}),
    ("mixtral", {"moe_router_score_function": "sqrtsoftplus"}), ("mixtral", {"moe_router_enable_expert_bias": True}),
    ("mixtral", {"normalization": "LayerNorm"}), ("mixtral", {"layernorm_epsilon": 1e-3}),
    ("mixtral", {"position_embedding_type": "learned_absolute"}), ("mixtral", {"position_embedding_type": "yarn"}),
    ("mixtral", {"position_embedding_type": "mrope"}), ("sigmoid", {"moe_router_enable_expert_bias": False}),
    ("mixtral", {"moe_shared_expert_intermediate_size": 5}), ("sigmoid", {"moe_router_topk": 1}),
    ("switch", {"moe_token_drop_policy": "luck", "moe_expert_capacity_factor": 1.0}),
    ("mixtral", {"moe_layer_freq": "every other"}),
]


@pytest.mark.parametrize(("kind", "changes"), WRONG, ids=str)
def test_what_is_read_and_cannot_be_expressed_is_refused(kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"there: {next(iter(changes))}=") as error:
        read(stored(MODELS[kind], **changes))
    assert "\n" not in str(error.value)


OTHER: dict[str, tuple[str, Any]] = {  # what is read: a model, and another value that it can have
    "num_layers": ("mixtral", 1), "hidden_size": ("mixtral", 24), "ffn_hidden_size": ("mixtral", 40),
    "num_attention_heads": ("mixtral", 8), "group_query_attention": ("mixtral", False),
    "num_query_groups": ("mixtral", 1), "kv_channels": ("mixtral", 4), "padded_vocab_size": ("mixtral", 300),
    "seq_length": ("mixtral", 99), "norm_epsilon": ("mixtral", 1e-6), "position_embedding_type": ("mixtral", "none"),
    "rotary_base": ("mixtral", 500), "swiglu": ("mixtral", False), "window_size": ("mixtral", (8, 0)),
    "untie_embeddings_and_output_weights": ("mixtral", False), "num_experts": ("mixtral", 24),
    "moe_layer_freq": ("mixtral", 2), "moe_router_topk": ("mixtral", 3), "moe_ffn_hidden_size": ("mixtral", 16),
    "moe_shared_expert_intermediate_size": ("mixtral", 48), "moe_router_topk_scaling_factor": ("sigmoid", 2.5),
    "moe_router_num_groups": ("sigmoid", 2), "moe_router_group_topk": ("sigmoid", 1),
    "moe_router_bias_update_rate": ("sigmoid", 0.1), "moe_router_load_balancing_type": ("sigmoid", "global_aux_loss"),
    "moe_aux_loss_coeff": ("sigmoid", 0.3), "moe_z_loss_coeff": ("mixtral", 0.3),
    "moe_router_pre_softmax": ("mixtral", True), "moe_input_jitter_eps": ("mixtral", 0.1),
    "moe_expert_capacity_factor": ("switch", 1.5),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_read_counts(name: str) -> None:
    kind, value = OTHER[name]
    assert read(stored(MODELS[kind], **{name: value})) != read(stored(MODELS[kind]))


def test_an_argument_that_nobody_knows() -> None:
    """Set, it is refused by its name; as unset as a flag that was not given, it is not."""
    for value in (None, False, 0, 0.0, "", []):
        assert read(stored(attention_softcap=value)) == read(stored())
    for value in (30.0, True, "tanh", [1]):
        with pytest.raises(ConfigError, match="attention_softcap="):
            read(stored(attention_softcap=value))
    with pytest.raises(ConfigError, match="args"):
        read(Namespace())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
def test_the_balance_loss_goes_across(kind: str, scope: str) -> None:
    moe = {**MODELS[kind], "balance_over": scope, "load_balance_coefficient": 0.02}
    if kind == "switch":
        moe |= {"capacity_factor": 1.5, "eval_capacity_factor": 1.5, "drop_by": "probability"}
    config = make_config({}, moe, micro_batch=4)
    args = write_arguments(config, FileLayout())
    assert args.moe_router_load_balancing_type == {"sequence": "seq_aux_loss", "micro_batch": "aux_loss",
                                                   "global_batch": "global_aux_loss"}[scope]
    found = read(args)
    assert found.moe == config.moe
    if scope == "micro_batch":
        assert (found.data.micro_batch, found.data.global_batch) == (4, config.data.global_batch)
        args.micro_batch_size = 1
        assert read(args).moe.balance_over == "sequence"
    idle = write_arguments(make_config({}, {**MODELS[kind], "load_balance_coefficient": 0.0}), FileLayout())
    assert idle.moe_router_load_balancing_type == "none"
    assert read(args).moe.load_balance_coefficient == 0.02


def test_the_coefficient_means_the_same() -> None:
    """Megatron-Core 0.16.1's `switch_load_balancing_loss_func` gave these two numbers for these logits, top-2 of 4.

    0.01 times the loss of six tokens as one micro-batch, and as two sequences, whose mean it takes.
    """
    router = build_model(make_config({}, {"num_experts": 4}), "cpu").blocks["0"].channel_mixer.router
    logits = (torch.arange(24.0).view(6, 4) * 7 % 5) / 3
    for groups, theirs in ((1, 0.010087051428854465), (2, 0.010302628390491009)):
        inputs = logits.view(groups, -1, 4)
        expert, _ = router.choose(inputs, inputs.softmax(-1))
        valid = torch.ones(inputs.shape[:2], dtype=torch.bool)
        ours = 0.01 * router.balance_loss(expert, inputs.softmax(-1), valid) / 6  # the engine divides by the tokens
        assert float(ours) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("router", ["mixtral", "sigmoid_bias"])
def test_the_weight_of_one_expert(tmp_path: Path, router: str) -> None:
    """1 here; there the score as it is (sigmoid), or refused by Megatron itself or the share of all (softmax)."""
    one = write_run(tmp_path / "one", make_config({}, {"router": router, "top_k": 1}))
    with pytest.raises(ConfigError, match=r"moe\.top_k=1"):
        convert(open_source(one), tmp_path / "there", "megatron", FileLayout())
    assert not (tmp_path / "there").exists()
