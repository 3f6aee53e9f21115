"""What a description says of a model is what the module is: names, shapes, first values, decay, FLOPs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moescale.config import Config, load_config, parse_config
from moescale.model import build
from moescale.model.build import build_model
from moescale.optim.optimizer import build_optimizer
from moescale.spec.mamba import MambaConfig
from moescale.spec.mamba2 import Mamba2Config
from moescale.spec.model import MIXERS, LayerConfig, describe
from moescale.spec.weights import Weight
from tests.support.groups import in_groups

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))
SMALL = {"vocab_size": 40, "d_model": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 24}
SCORES = {  # a kind of mixer: its scan, and its convolution of three
    MambaConfig: 32 * 6 * 6 + 2 * 3 * 32, Mamba2Config: 32 * 6 * 6 + 2 * 3 * (32 + 2 * 2 * 6)}
MIXED = [{"channel_mixer": "feed_forward"}, {"channel_mixer": "moe"}, {"channel_mixer": "none"}]
KINDS: dict[str, dict[str, Any]] = {
    f"{block}, {norm}, {activation}, {init}{', tied' if tied else ''}": {
        **in_groups({**SMALL, "block": block, "norm": norm, "activation": activation, "init": init, "pattern": MIXED,
                  "tied_embeddings": tied}),
        "moe": {"num_experts": 4, "d_ff": 8, "activation": activation, "num_shared_experts": 2 if tied else 0}}
    for (block, norm, tied), (activation, init) in itertools.product(
        [("serial", "rmsnorm", False), ("parallel", "layernorm", True)],
        [("swiglu", "normal"), ("geglu", "fan_in"), ("gelu", "switch"), ("relu", "normal")])
}
NORMED = {"mixer": "mamba", "mamba": {"inner_norms": True}}
KINDS["mamba"] = {**in_groups({**SMALL, "pattern": [{"mixer": "mamba"}, NORMED]}),
                  "mamba": {"d_state": 6, "d_conv": 3}, "moe": {"num_experts": 4, "d_ff": 8}}
KINDS["mamba2"] = {**in_groups({**SMALL, "pattern": [{"mixer": "mamba2"}]}), "moe": {"num_experts": 4, "d_ff": 8},
                   "mamba2": {"d_state": 6, "d_conv": 3, "head_dim": 8, "num_groups": 2}}
KINDS["rezero"] = {**in_groups({**SMALL, "norm": "none", "residual": "rezero", "pattern": MIXED}),
                   "moe": {"num_experts": 4, "d_ff": 8}}
KINDS["sigmoid_bias"] = {**in_groups(SMALL), "moe": {"router": "sigmoid_bias", "num_experts": 4, "d_ff": 8}}


def check(config: Config, model: nn.Module) -> None:
    """Hold names and shapes to the module's parameters and buffers, and decay to the optimizer's groups."""
    described: dict[str, Weight] = {".".join(weight.name): weight for weight in describe(config).weights()}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: weight.shape for name, weight in described.items()}
    parameters = dict(model.named_parameters())
    assert set(parameters) == {name for name, weight in described.items() if weight.learns}
    decaying = {id(parameter) for group in build_optimizer(model, describe(config), config.optim).param_groups
                if group["weight_decay"] > 0 for parameter in group["params"]}
    assert {name for name, parameter in parameters.items() if id(parameter) in decaying} == {
        name for name, weight in described.items() if weight.decays and weight.learns}
    for weight in described.values():
        assert len(weight.dims) == len(weight.shape)
        assert weight.cut in weight.dims if weight.cut else weight.view == "shared", "what nobody cuts meets all tokens"


def test_every_mixer_has_a_name_and_keys() -> None:
    fields = LayerConfig.model_fields
    assert get_args(fields["mixer"].annotation) == tuple(MIXERS)
    assert all(fields[name].annotation == dict[str, Any] for name in MIXERS)
    assert {name: Config.model_fields[name].annotation for name in MIXERS} == MIXERS
    assert set(build.MIXERS) == set(MIXERS.values())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_description_is_its_module(path: Path) -> None:
    config = load_config(path, ["model.num_layers=2", "optim.weight_decay=0.1"])
    check(config, build_model(config))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_description_counts_what_the_module_computes(kind: dict[str, Any]) -> None:
    config = parse_config({**kind, "data": {"tokenizer": "none.json"}}, "test")
    model = build_model(config, "cpu")
    check(config, model)
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for index, layer in enumerate(config.layers):
            block = model.blocks[str(index)]
            x = torch.zeros(1, 6, 16)
            for part, of_part in ((block.mixer, layer.mixer), (block.channel_mixer, layer.channel_mixer)):
                if of_part is None:
                    continue
                with FlopCounterMode(display=False) as counter:
                    part(x, tokens)
                scores = 0
                if part is block.mixer:  # of which kernels count other shares, or are no products of matrices
                    scores = SCORES.get(type(of_part), 4 * 32 * 6)
                products = of_part.flops_per_token(16, 6) - scores
                counted = counter.get_flop_counts()["Global"]
                matrices = sum(n for operation, n in counted.items() if str(operation) in ("aten.mm", "aten.addmm"))
                assert matrices in (6 * products, 6 * (products + scores))
