"""Jamba: layers of Mamba and of attention without positions, each with a feed-forward or a mixture of experts."""

from __future__ import annotations

from typing import Any

from moescale.config import Config
from moescale.convert.formats.hf.base import (
    ATTENTION,
    COMMON,
    ELSEWHERE,
    EMBEDDING,
    KEY_HEADS,
    LAYER,
    NUMBER,
    POSITIVE,
    SEQ_LEN,
    ConfigJson,
    Family,
    Key,
    Translation,
    keys,
    only,
    rounded,
    rows,
)
from moescale.convert.formats.hf.mamba import SILU, STEP_RANK, mixer_rows
from moescale.convert.mapping.table import half, row, stacked_experts
from moescale.spec.model import shortest_pattern

CHANNEL_MIXER, FORWARD = "blocks.{layer}.channel_mixer.", LAYER + "feed_forward."
EXPERTS = {
    "published": rows(*(row(f"{CHANNEL_MIXER}experts.{part}", FORWARD + f"experts.{{expert}}.{part}_proj.weight")
                        for part in ("gate", "up", "down"))),
    "fused": rows(
        row(CHANNEL_MIXER + "experts.gate", FORWARD + "experts.gate_up_proj", half(0), stacked_experts()),
        row(CHANNEL_MIXER + "experts.up", FORWARD + "experts.gate_up_proj", half(1), stacked_experts()),
        row(CHANNEL_MIXER + "experts.down", FORWARD + "experts.down_proj", stacked_experts()),
    ),
}


def _layers(values: ConfigJson) -> list[dict[str, Any]]:
    """Say of which kind each layer is: those of one kind come back after a period, the first of them at an offset."""
    def comes(kind: str, layer: int) -> bool:
        return layer % values.positive(f"{kind}_layer_period") == values.integer(f"{kind}_layer_offset")

    experts = values.positive("num_experts")
    return [{"mixer": "attention" if comes("attn", layer) else "mamba",
             "channel_mixer": "moe" if experts > 1 and comes("expert", layer) else "feed_forward"}
            for layer in range(values.positive("num_hidden_layers"))]


def _places(config: Config, kind: str) -> tuple[int, int]:
    """Find the period and the offset of the layers of a kind. Neither fits where these come irregularly."""
    places = [index for index, layer in enumerate(config.model.layers) if kind in (layer.mixer, layer.channel_mixer)]
    if not places:
        return config.model.num_layers + 1, config.model.num_layers  # none comes
    return places[1] - places[0] if len(places) > 1 else config.model.num_layers, places[0]


def _comes_back(config: Config, kind: str) -> bool:
    period, offset = _places(config, kind)
    return offset < period and all(
        (kind in (layer.mixer, layer.channel_mixer)) == (index % period == offset)
        for index, layer in enumerate(config.model.layers))


def _pattern(kind: str, part: int) -> Translation:
    """Read the whole pattern; write a kind's period (part 0) or offset (part 1)."""
    return Translation(lambda values, name: shortest_pattern(_layers(values)),
                       lambda value, config: _places(config, kind)[part],
                       lambda value, config: _comes_back(config, kind))


def _width(config: Config) -> int:
    """Look up the hidden features of feed-forwards and experts, which are as many in both."""
    return config.moe.d_ff if config.num_moe_layers == config.model.num_layers else config.feed_forward.d_ff


def _is_one_kind(config: Config) -> bool:
    """Say whether feed-forwards and experts are as wide, and have the one activation that Mamba's layers have."""
    mixers = [layer.channel_mixer for layer in config.layers if layer.channel_mixer is not None]
    return {(mixer.d_ff, mixer.activation) for mixer in mixers} == {(_width(config), "swiglu")}


WIDTH = Translation(ConfigJson.integer, lambda value, config: _width(config),
                    lambda value, config: _is_one_kind(config))


def _mixtures(layers: list[dict[str, Any]]) -> int:
    return max(1, sum(layer["channel_mixer"] == "moe" for layer in layers))


# as in Mixtral, but that only layers with experts count
BALANCE = Translation(
    lambda values, name: rounded(values.number(name) * values.integer("num_experts_per_tok")
                                 / _mixtures(_layers(values))),
    lambda value, config: rounded(value * max(1, config.num_moe_layers) / config.moe.top_k),
)
# a single one is a feed-forward there, without a router
EXPERTS_OF_A_LAYER = Translation(ConfigJson.positive, fits=lambda value, config: value > 1 or not config.num_moe_layers)
FAMILY = Family(
    "jamba", "Jamba",
    (("mamba", "feed_forward"), ("mamba", "moe"), ("attention", "feed_forward"), ("attention", "moe")),
    keys={name: key for name, key in COMMON.items() if not name.startswith("rope_") and name != "layer_types"} | keys(
        Key("vocab_size", 65536, "model.vocab_size"),
        Key("intermediate_size", 14336, "feed_forward.d_ff moe.d_ff", WIDTH),
        Key("hidden_act", "silu", translation=SILU),
        Key("num_key_value_heads", 8, "attention.num_kv_heads", KEY_HEADS),
        Key("max_position_embeddings", 262144, "data.seq_len", SEQ_LEN),
        Key("rms_norm_eps", 1e-6, "model.norm_eps", NUMBER),
        Key("attn_layer_period", 8, "model.pattern", _pattern("attention", 0)),
        Key("attn_layer_offset", 4, "model.pattern", _pattern("attention", 1)),
        Key("expert_layer_period", 2, "model.pattern", _pattern("moe", 0)),
        Key("expert_layer_offset", 1, "model.pattern", _pattern("moe", 1)),
        Key("num_experts", 16, "moe.num_experts", EXPERTS_OF_A_LAYER, alias="num_local_experts"),
        Key("num_experts_per_tok", 2, "moe.top_k"),
        Key("router_aux_loss_coef", 0.001, "moe.load_balance_coefficient", BALANCE),
        Key("mamba_d_state", 16, "mamba.d_state", POSITIVE),
        Key("mamba_d_conv", 4, "mamba.d_conv", POSITIVE),
        Key("mamba_expand", 2, "mamba.expand", POSITIVE),
        Key("mamba_dt_rank", "auto", "mamba.dt_rank", STEP_RANK),
        Key("mamba_conv_bias", True, translation=only(True)),
        Key("mamba_proj_bias", False, translation=only(False)),
        *(Key(name, default, translation=ELSEWHERE) for name, default in (
            ("use_mamba_kernels", True), ("use_mambapy", False), ("use_associative_scan", True),
            ("num_logits_to_keep", None))),
    ),
    rows=EMBEDDING | ATTENTION | mixer_rows(LAYER + "mamba.") | rows(
        row("blocks.{layer}.channel_norm.weight", LAYER + "pre_ff_layernorm.weight"),
        *(row(f"{CHANNEL_MIXER}{part}.weight", f"{FORWARD}{part}_proj.weight") for part in ("gate", "up", "down")),
        row(CHANNEL_MIXER + "router.weight", FORWARD + "router.weight"),
        *(row(f"blocks.{{layer}}.mixer.{ours}_norm.weight", f"{LAYER}mamba.{theirs}_layernorm.weight")
          for ours, theirs in (("step", "dt"), ("b", "b"), ("c", "c"))),
        row("norm.weight", "model.final_layernorm.weight"),
        row("head.weight", "lm_head.weight"),
    ),
    experts=EXPERTS,
    fixed={"model.block": "serial", "model.norm": "rmsnorm", "model.scale_logits": False,
           "attention.positions": "none", "attention.window": None, "moe.router": "mixtral",
           "moe.normalize_weights": False, "moe.num_shared_experts": 0, "moe.jitter": 0.0, "mamba.inner_norms": True},
    begins={"moe.balance_over": "global_batch"},
)
