"""Megatron-Core's names, a table for its distributed checkpoints and one for the files of its ranks; its arguments."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from moescale.checkpoint.mapped import Layout
from moescale.checkpoint.table import (
    Row,
    Transform,
    grouped_columns,
    grouped_rows,
    half,
    query_groups,
    row,
    stacked_experts,
    stacked_layers,
    transposed,
)
from moescale.config import Config, ConfigError, parse_config

BLOCK, MIXER = "blocks.{layer}.", "blocks.{layer}.channel_mixer."
GATED = ("gate", "up")


def _names(prefix: str, norm: str, channel_norm: str, *outer: Transform, apart: bool = False) -> tuple[Row, ...]:
    """Write the rows of a model without its experts.

    prefix: of a layer. norm, channel_norm: what the two norms are called. outer: around all that is in a layer.
    apart: gate and up have names of their own.
    """
    shared, attention = "mlp.shared_experts.", prefix + "self_attention."
    return (
        row("embedding.weight", "embedding.word_embeddings.weight", cut=0),
        row(BLOCK + "mixer_norm.weight", prefix + norm, *outer),
        *(row(f"{BLOCK}mixer.{part}.weight", attention + "linear_qkv.weight", query_groups(part), *outer, cut=0)
          for part in ("q", "k", "v")),
        row(BLOCK + "mixer.o.weight", attention + "linear_proj.weight", *outer, cut=1),
        row(BLOCK + "channel_norm.weight", prefix + channel_norm, *outer),
        row(MIXER + "router.weight", prefix + "mlp.router.weight", *outer),
        row(MIXER + "router.expert_bias", prefix + "mlp.router.expert_bias", *outer),
        row(MIXER + "down.weight", prefix + "mlp.linear_fc2.weight", *outer, cut=1),
        row(MIXER + "shared.down.weight", prefix + shared + "linear_fc2.weight", *outer, cut=1),
        row("norm.weight", "decoder.final_layernorm.weight"),
        row("head.weight", "output_layer.weight", cut=0),
        *_first(MIXER + "{part}.weight", prefix + "mlp.linear_fc1.weight", *outer, apart=apart),
        *_first(MIXER + "shared.{part}.weight", prefix + shared + "linear_fc1.weight", *outer, apart=apart),
    )


def _first(native: str, foreign: str, *outer: Transform, apart: bool = False) -> tuple[Row, ...]:
    """Write the rows of a feed-forward's first matrix, which holds gate and up, or of two matrices. native: {part}"""
    return tuple(
        row(native.replace("{part}", part), foreign + suffix, *outer, cut=0) if apart else
        row(native.replace("{part}", part), foreign, half(index), *outer, cut=0)
        for index, (part, suffix) in enumerate(zip(GATED, ("_w", "_v"), strict=True)))


def _experts(first: str, second: str, *outer: Transform, apart: bool = False) -> tuple[Row, ...]:
    """Write the rows of experts in layers of their own. first, second: names of the two matrices; outer: around them"""
    return (
        *_first(MIXER + "experts.{part}.{expert}", first, *outer, apart=apart),
        row(MIXER + "experts.down.{expert}", second, *outer, cut=1),
    )


LAYER, LAYERS = "decoder.layers.{layer}.", "decoder.layers."
FUSED_NORM, PLAIN_NORM = "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
DENSE_NORM, MOE_NORM = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
DISTRIBUTED = {  # all layers alike, in one tensor; each layer by its number; each expert and half of a matrix too
    "stacked": (
        *_names(LAYERS, FUSED_NORM, MOE_NORM, stacked_layers()),
        *_experts(LAYERS + "mlp.experts.experts.linear_fc1.weight", LAYERS + "mlp.experts.experts.linear_fc2.weight",
                  stacked_experts(), stacked_layers()),
    ),
    "numbered": (
        *_names(LAYER, FUSED_NORM, MOE_NORM),
        *_experts(LAYER + "mlp.experts.experts.linear_fc1.weight", LAYER + "mlp.experts.experts.linear_fc2.weight",
                  stacked_experts()),
    ),
    "apart": (
        *_names(LAYER, FUSED_NORM, MOE_NORM, apart=True),
        *_experts(LAYER + "mlp.experts.experts.{expert}.linear_fc1.weight",
                  LAYER + "mlp.experts.experts.{expert}.linear_fc2.weight", apart=True),
    ),
}
OF_RANKS = {
    "sequential": _experts(LAYER + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
                           LAYER + "mlp.experts.local_experts.{expert}.linear_fc2.weight"),
    "te_grouped": _experts(LAYER + "mlp.experts.linear_fc1.weight{expert}",
                           LAYER + "mlp.experts.linear_fc2.weight{expert}"),
    "grouped": (
        *_first(MIXER + "experts.{part}.{expert}", LAYER + "mlp.experts.weight1", transposed(), grouped_columns()),
        row(MIXER + "experts.down.{expert}", LAYER + "mlp.experts.weight2", transposed(), grouped_rows(), cut=1),
    ),
}
RANK_NAMES = _names(LAYER, PLAIN_NORM, MOE_NORM)
OTHER_NAMES = {  # what a layer's norms are called where they are fused with the matrix behind them
    PLAIN_NORM: FUSED_NORM, MOE_NORM: DENSE_NORM,
}
STYLES = ("torch_dist", *OF_RANKS)


def ungated(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The same table for a model whose feed-forwards have one first matrix: it is not half of one."""
    halves = {id(found): found for found in rows if ".gate" in found.native}
    kept = [found for found in rows if id(found) not in halves]
    return tuple(Row(found.native, found.foreign.removesuffix("_v"), found.transforms[1:], found.cut)
                 if ".up" in found.native else found for found in kept)


def read_arguments(args: Namespace, source: str) -> Config:
    """Turn the arguments that Megatron stores into a run. Raises ConfigError for what MoEScale cannot express."""
    def get(name: str, default: Any = None) -> Any:
        value = getattr(args, name, default)
        return default if value is None else value

    wrong = {
        "normalization": get("normalization", "LayerNorm") != "RMSNorm",
        "add_bias_linear": get("add_bias_linear", False), "add_qkv_bias": get("add_qkv_bias", False),
        "qk_layernorm": get("qk_layernorm", False),
        "position_embedding_type": get("position_embedding_type", "rope") not in ("rope", "none"),
        "rotary_percent": get("rotary_percent", 1.0) != 1.0, "rotary_interleaved": get("rotary_interleaved", False),
        "multi_latent_attention": get("multi_latent_attention", False), "mtp_num_layers": bool(get("mtp_num_layers")),
        "apply_layernorm_1p": get("apply_layernorm_1p", False), "squared_relu": get("squared_relu", False),
        "moe_shared_expert_gate": get("moe_shared_expert_gate", False),
    }
    for name, bad in wrong.items():
        if bad:
            raise ConfigError(f"{source}: {name}={get(name)!r} cannot be expressed by MoEScale")
    try:
        layers, heads, d_model = args.num_layers, args.num_attention_heads, args.hidden_size
        activation = "swiglu" if get("swiglu", False) else "gelu"
        window = get("window_size")
        mixtures = _mixtures(get("moe_layer_freq", 1), layers) if get("num_experts") else [False] * layers
        model = {
            "vocab_size": get("padded_vocab_size", get("vocab_size")), "d_model": d_model, "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": get("num_query_groups", heads) if get("group_query_attention", False) else heads,
            "head_dim": get("kv_channels", d_model // heads), "d_ff": get("ffn_hidden_size", 4 * d_model),
            "activation": activation, "window": None if not window else window[0] + 1,
            "positions": get("position_embedding_type", "rope"), "rope_theta": float(get("rotary_base", 10000)),
            "norm_eps": get("norm_epsilon", get("layernorm_epsilon", 1e-5)),
            "tied_embeddings": not get("untie_embeddings_and_output_weights", False), "pattern": _pattern(mixtures),
        }
        groups = {"model": model, "data": {"seq_len": get("seq_length", 2048), "tokenizer": None}}
        if any(mixtures):
            groups["moe"] = _read_moe(get, activation, source)
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"{source}: its arguments are not whole ({error})") from None
    return parse_config(groups, source)


def _mixtures(frequency: int | list[int], layers: int) -> list[bool]:
    if isinstance(frequency, int):
        return [index % frequency == 0 for index in range(layers)]
    return [bool(entry) for entry in frequency]


def _pattern(mixtures: list[bool]) -> list[dict[str, str]]:
    """-> the shortest pattern that, tiled, gives these layers"""
    kinds = [{"channel_mixer": "moe" if mixture else "feed_forward"} for mixture in mixtures]
    return next(kinds[:size] for size in range(1, len(kinds) + 1)
                if all(kind == kinds[index % size] for index, kind in enumerate(kinds)))


def _read_moe(get: Any, activation: str, source: str) -> dict[str, Any]:
    top_k, score = get("moe_router_topk", 2), get("moe_router_score_function", "softmax")
    width = get("moe_ffn_hidden_size", get("ffn_hidden_size"))
    moe = {
        "num_experts": get("num_experts"), "top_k": top_k, "d_ff": width, "activation": activation,
        "num_shared_experts": get("moe_shared_expert_intermediate_size", 0) // width,
        "load_balance_coefficient": get("moe_aux_loss_coeff", 0.0),
        "router_z_coefficient": get("moe_z_loss_coeff", 0.0), "jitter": get("moe_input_jitter_eps", 0.0),
        "router": "mixtral",
    }
    if score == "sigmoid":
        moe |= {
            "router": "sigmoid_bias", "routed_scaling": get("moe_router_topk_scaling_factor", 1.0),
            "num_expert_groups": get("moe_router_num_groups", 1), "top_k_groups": get("moe_router_group_topk", 1),
            "bias_update_rate": get("moe_router_bias_update_rate", 0.001),
        }
    elif get("moe_router_pre_softmax", False):
        if top_k != 1:
            raise ConfigError(f"{source}: moe_router_pre_softmax with moe_router_topk={top_k} cannot be expressed by "
                              "MoEScale")
        moe |= {"router": "switch", "capacity_factor": get("moe_expert_capacity_factor")}
    return moe


def write_arguments(config: Config, layout: Layout) -> Namespace:
    """Turn a run into the arguments that Megatron looks for in a checkpoint."""
    model, moe = config.model, config.moe
    values: dict[str, Any] = {
        "num_layers": model.num_layers, "hidden_size": model.d_model, "ffn_hidden_size": model.d_ff,
        "num_attention_heads": model.num_heads, "group_query_attention": True, "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim, "vocab_size": model.vocab_size, "padded_vocab_size": model.vocab_size,
        "make_vocab_size_divisible_by": 1, "max_position_embeddings": config.data.seq_len,
        "seq_length": config.data.seq_len, "normalization": "RMSNorm", "norm_epsilon": model.norm_eps,
        "position_embedding_type": model.positions, "rotary_base": model.rope_theta, "rotary_percent": 1.0,
        "swiglu": _activation(config) == "swiglu",
        "window_size": None if model.window is None else (model.window - 1, 0),
        "untie_embeddings_and_output_weights": not model.tied_embeddings, "add_bias_linear": False,
        "add_qkv_bias": False, "tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep, "expert_tensor_parallel_size": layout.etp, "iteration": 0,
        "num_experts": None,
    }
    if config.num_moe_layers:
        sigmoid = moe.router == "sigmoid_bias"
        values |= {
            "num_experts": moe.num_experts, "moe_router_topk": moe.top_k, "moe_ffn_hidden_size": moe.d_ff,
            "moe_layer_freq": [int(layer.channel_mixer == "moe") for layer in model.layers],
            "moe_router_score_function": "sigmoid" if sigmoid else "softmax",
            "moe_router_pre_softmax": moe.router == "switch", "moe_router_enable_expert_bias": sigmoid,
            "moe_router_bias_update_rate": moe.bias_update_rate,
            "moe_router_topk_scaling_factor": moe.routed_scaling if sigmoid else None,
            "moe_router_num_groups": moe.num_expert_groups if moe.num_expert_groups > 1 else None,
            "moe_router_group_topk": moe.top_k_groups if moe.num_expert_groups > 1 else None,
            "moe_router_load_balancing_type": "none" if sigmoid else "aux_loss",
            "moe_aux_loss_coeff": moe.load_balance_coefficient, "moe_z_loss_coeff": moe.router_z_coefficient or None,
            "moe_input_jitter_eps": moe.jitter or None, "moe_expert_capacity_factor": moe.capacity_factor,
            "moe_shared_expert_intermediate_size": moe.num_shared_experts * moe.d_ff or None,
            "moe_grouped_gemm": layout.style != "sequential",
        }
    return Namespace(**values)


def _activation(config: Config) -> str:
    return config.moe.activation if config.num_moe_layers else config.model.activation


def refuse(config: Config, layout: Layout, dtype: torch.dtype | None) -> None:
    """Refuse by name what MoEScale can express and Megatron-Core cannot."""
    model, moe, mixtures = config.model, config.moe, config.num_moe_layers
    groups = mixtures and moe.num_expert_groups > 1 and moe.top_k < moe.top_k_groups
    wrong = {
        "model.block": model.block != "serial", "model.norm": model.norm != "rmsnorm",
        "model.positions": model.positions == "alibi", "model.scale_logits": model.scale_logits,
        "model.activation": mixtures < model.num_layers and model.activation not in ("swiglu", "gelu"),
        "moe.activation": mixtures and (moe.activation not in ("swiglu", "gelu") or (
            mixtures < model.num_layers and moe.activation != model.activation)),
        "moe.router": mixtures and moe.router not in ("mixtral", "switch", "sigmoid_bias"), "moe.top_k_groups": groups,
        "moe.left_behind_choices": mixtures and moe.left_behind_choices > 1,
        "moe.eval_capacity_factor": mixtures and moe.eval_capacity_factor is not None,
        "moe.drop_by": mixtures and moe.drop_by != "position",
    }
    for key, bad in wrong.items():
        if bad:
            group, name = key.split(".")
            raise ConfigError(f"{key}={getattr(getattr(config, group), name)} cannot be expressed by Megatron-Core: "
                              "convert --to moescale or deepspeed")
    if layout.style not in (None, *STYLES):
        raise ConfigError(f"--style {layout.style}: a Megatron checkpoint is {', '.join(STYLES)}")
    if layout.style == "torch_dist" and layout != Layout(style="torch_dist"):
        raise ConfigError("--style torch_dist is not cut by a layout, and loads in every one: leave out --ep, --tp, "
                          "--pp and --etp, or write --style sequential, grouped or te_grouped")
    sizes = {"model.num_kv_heads": (model.num_kv_heads, "tp"), "model.vocab_size": (model.vocab_size, "tp"),
             "model.num_layers": (model.num_layers, "pp")}
    if mixtures:
        sizes |= {"moe.num_experts": (moe.num_experts, "ep"), "moe.d_ff": (moe.d_ff, "etp"), "--tp": (layout.tp, "etp")}
    if mixtures < model.num_layers:
        sizes["model.d_ff"] = (model.d_ff, "tp")
    for name, (size, key) in sizes.items():
        degree = getattr(layout, key)
        if size % degree:
            raise ConfigError(f"--{key} {degree} must divide {name}={size}")
