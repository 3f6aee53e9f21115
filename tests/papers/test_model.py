"""Whole models against the papers' formulas: every loss and every gradient, in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moescale.config import Config, parse_config
from moescale.model.build import build_model
from moescale.model.language_model import LanguageModel
from moescale.ops.token_random import uniform
from moescale.spec.attention import AttentionConfig
from moescale.spec.feed_forward import FeedForwardConfig
from tests.papers import formulas
from tests.support.groups import in_groups

MODEL = {"vocab_size": 40, "d_model": 16, "num_layers": 2, "num_heads": 4, "head_dim": 8, "d_ff": 24,
         "norm_eps": 1e-2}  # an eps that shows
PALM = {**in_groups({**MODEL, "num_kv_heads": 1, "block": "parallel", "norm": "layernorm", "tied_embeddings": True,
                  "scale_logits": True, "z_loss_coefficient": 0.3, "pattern": [{"channel_mixer": "feed_forward"}]})}
SERIAL = {**MODEL, "num_kv_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "palm": PALM,
    "dense relu alibi": {**in_groups({**SERIAL, "activation": "relu", "positions": "alibi", "norm": "layernorm",
                                   "pattern": [{"channel_mixer": "feed_forward"}]})},
    "dense gelu no positions": {**in_groups({**SERIAL, "activation": "gelu", "positions": "none", "rope_theta": 500.0,
                                          "pattern": [{"channel_mixer": "feed_forward"}]})},
    "rezero": {**in_groups({**SERIAL, "norm": "none", "residual": "rezero", "positions": "none",
                            "embedding_positions": "sinusoidal",
                            "pattern": [{"channel_mixer": "feed_forward"}, {"channel_mixer": "moe"}]}),
               "moe": {"num_experts": 4, "top_k": 2, "d_ff": 8}},
    "mixtral": {**in_groups({**SERIAL, "window": 5, "rope_theta": 1e6}),
                "moe": {"num_experts": 6, "top_k": 2, "d_ff": 8, "router_z_coefficient": 0.2}},
    "mixtral, not normalized": {**in_groups({**SERIAL, "positions": "none"}), "moe": {
        "num_experts": 6, "top_k": 2, "d_ff": 8, "normalize_weights": False}},
    "switch": {**in_groups({**SERIAL, "activation": "geglu", "tied_embeddings": True, "scale_logits": True,
                         "pattern": [{"channel_mixer": "feed_forward"}, {"channel_mixer": "moe"}]}),
               "moe": {"router": "switch", "num_experts": 3, "top_k": 1, "capacity_factor": 0.9, "d_ff": 8,
                       "activation": "geglu"}},
    "gshard": {**in_groups({**SERIAL, "norm": "layernorm", "activation": "relu"}),
               "moe": {"router": "gshard", "num_experts": 4, "top_k": 2, "capacity_factor": 0.8, "d_ff": 8,
                       "activation": "relu"}},
    "sigmoid_bias": {**in_groups(SERIAL), "moe": {"router": "sigmoid_bias", "num_experts": 6, "top_k": 3, "d_ff": 8}},
    "sigmoid_bias, three of a group": {**in_groups(SERIAL), "moe": {
        "router": "sigmoid_bias", "num_experts": 16, "top_k": 6, "num_expert_groups": 4, "top_k_groups": 2, "d_ff": 8}},
    "sigmoid_bias, one of a group": {**in_groups(SERIAL), "moe": {
        "router": "sigmoid_bias", "num_experts": 12, "top_k": 2, "num_expert_groups": 4, "top_k_groups": 2, "d_ff": 8}},
    "a window in every second layer": {
        **in_groups({**SERIAL, "num_layers": 4, "pattern": [
            {"channel_mixer": "feed_forward", "attention": {"window": 3, "num_kv_heads": 1}},
            {"channel_mixer": "moe", "attention": {"positions": "none"}, "moe": {"d_ff": 24, "activation": "relu"}}]}),
        "moe": {"num_experts": 4, "d_ff": 8}},
    "the survey's patterns": {**in_groups({**SERIAL, "num_layers": 5, "pattern": [
        {"channel_mixer": "feed_forward", "attention": keys} for keys in (
            {"window": 3, "dilation": 2}, {"block_size": 5}, {"window": 2, "stride": 3, "positions": "alibi"},
            {"window": 2, "global_tokens": 3}, {"dilation": 3, "num_kv_heads": 1})]})},
    "only attention in every second layer": {**in_groups({**SERIAL, "num_layers": 4, "pattern": [
        {"channel_mixer": "none"}, {"channel_mixer": "feed_forward"}]})},
    "expert_choice": {**in_groups(SERIAL), "moe": {"router": "expert_choice", "num_experts": 4, "top_k": 2,
                                               "capacity_factor": 1.7, "d_ff": 8}},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_equals_the_papers_formulas(family: str) -> None:
    config = parse_config({**FAMILIES[family], "precision": {"compute": "float64"},
                           "data": {"tokenizer": "none.json"}}, "test")
    model = _random_model(config)
    tokens = torch.randint(0, config.model.vocab_size, (3, 13))
    token_id = torch.arange(100, 136).view(3, 12)
    sums = model(tokens[:, :-1], targets=tokens[:, 1:], positions=torch.arange(12).expand(3, 12), token_id=token_id)
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")}
    gradients = torch.autograd.grad(_total(sums, config), list(model.parameters()))
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    expected = [sum(parts) for parts in zip(*(
        _paper(config, weights | biases, *each) for each in zip(tokens, token_id, strict=True)), strict=True)]
    for ours, theirs, what in zip(sums, expected, ("cross entropy", "z-loss", "balance", "router z"), strict=True):
        assert ours.item() == pytest.approx(float(theirs), rel=1e-6, abs=1e-9), what
    theirs = torch.autograd.grad(_total(expected, config), list(weights.values()))
    for name, ours, reference in zip(weights, gradients, theirs, strict=True):
        difference = float((ours - reference).norm() / reference.norm())
        assert difference < 4e-6, f"the gradient of {name}"  # the angles of positions are float32 in ours


def _random_model(config: Config) -> LanguageModel:
    model = build_model(config, "cpu")
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            torch.nn.init.normal_(buffer, 0.0, 0.2)
    return model.train()


def _total(sums: Any, config: Config) -> Tensor:
    """The four sums in one number, each with a weight that shows."""
    cross_entropy, output_z, balance, router_z = sums
    return cross_entropy + config.model.z_loss_coefficient * output_z + 0.7 * balance + 0.2 * router_z


def _paper(config: Config, weights: dict[str, Tensor], tokens: Tensor, token_id: Tensor) -> list[Tensor]:
    """The four sums of one sequence. tokens: [seq + 1]"""
    model = config.model
    norm = {"layernorm": formulas.layer_norm, "rmsnorm": formulas.rms_norm, "none": lambda x, *_: x}[model.norm]
    x = weights["embedding.weight"][tokens[:-1]]
    if model.embedding_positions == "sinusoidal":
        x = x + formulas.sinusoids(*x.shape)
    losses = [torch.zeros((), dtype=x.dtype), torch.zeros((), dtype=x.dtype)]
    for index, layer in enumerate(config.layers):
        attention, channel_mixer = layer.mixer, layer.channel_mixer
        of = f"blocks.{index}."
        own = {name.removeprefix(of): weight for name, weight in weights.items() if name.startswith(of)}
        alpha = own.get("residual.alpha", 1.0)  # x + alpha F(x), the same in both (ReZero, section 3)
        h = norm(x, own.get("mixer_norm.weight"), model.norm_eps)
        mixed = formulas.attention(
            h, {part: own[f"mixer.{part}.weight"] for part in "qkvo"}, attention.num_heads, attention.num_kv_heads,
            theta=attention.rope_theta if attention.positions == "rope" else None, sees=partial(_sees, attention),
            alibi=attention.positions == "alibi")
        if model.block == "parallel":  # y = x + MLP(norm(x)) + Attention(norm(x)) (PaLM, section 2)
            x = x + mixed + formulas.feed_forward(h, _dense(own), channel_mixer.activation)
            continue
        x = x + alpha * mixed
        if channel_mixer is None:
            continue
        h = norm(x, own.get("channel_norm.weight"), model.norm_eps)
        if isinstance(channel_mixer, FeedForwardConfig):
            x = x + alpha * formulas.feed_forward(h, _dense(own), channel_mixer.activation)
            continue
        router = own["channel_mixer.router.weight"]
        experts = [{part: own[f"channel_mixer.experts.{part}"][expert] for part in ("gate", "up", "down")
                    if f"channel_mixer.experts.{part}" in own} for expert in range(config.moe.num_experts)]
        salt = 2 * index + 1  # of the second expert's draws, with seed 0
        y, balance = formulas.mixture(h, router, experts, channel_mixer.activation, config.moe.router,
                                      top_k=config.moe.top_k, capacity=config.moe.capacity_factor,
                                      draws=uniform(token_id, salt), bias=own.get("channel_mixer.router.expert_bias"),
                                      groups=(config.moe.num_expert_groups, config.moe.top_k_groups),
                                      normalize=config.moe.normalize_weights)
        x, losses = x + alpha * y, [losses[0] + balance, losses[1] + formulas.router_z(h, router)]
    h = norm(x, weights.get("norm.weight"), model.norm_eps)
    head = weights["embedding.weight"] if model.tied_embeddings else weights["head.weight"]
    scale = model.d_model**-0.5 if model.scale_logits else 1.0
    return [*formulas.next_token_losses(h @ head.T * scale, tokens[1:]), *losses]


def _sees(keys: AttentionConfig, head: int, i: int, j: int) -> bool:
    """The fixed patterns of Efficient Transformers: A Survey, section 3: windows, steps, blocks, global tokens."""
    if keys.stride is not None and head >= keys.num_heads / 2:
        return (i - j) % keys.stride == 0  # Sparse Transformers' strided heads
    near = (i - j) % keys.dilation == 0 and (keys.window is None or (i - j) / keys.dilation < keys.window)
    local = near and (keys.block_size is None or i // keys.block_size == j // keys.block_size)
    return local or j < keys.global_tokens


def _dense(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {part: own[f"channel_mixer.{part}.weight"] for part in ("gate", "up", "down")
            if f"channel_mixer.{part}.weight" in own}
