"""Megatron-Core's names, a table for its distributed checkpoints and one for the files of its ranks; its arguments."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moescale.config import Config, ConfigError, parse_config
from moescale.convert.formats.megatron.arguments import refuse_unknown
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.mapping.table import (
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
from moescale.spec.model import shortest_pattern

BLOCK, MIXER = "blocks.{layer}.", "blocks.{layer}.channel_mixer."
INNER = ("gate", "up")


def _names(prefix: str, norm: str, channel_norm: str, *outer: Transform, apart: bool = False) -> tuple[Row, ...]:
    """Write the rows of a model without its experts.

    prefix: of a layer. norm, channel_norm: what the two norms are called. outer: around all that is in a layer.
    apart: gate and up have names of their own.
    """
    shared, attention = "mlp.shared_experts.", prefix + "self_attention."
    return (
        row("embedding.weight", "embedding.word_embeddings.weight"),
        row(BLOCK + "mixer_norm.weight", prefix + norm, *outer),
        *(row(f"{BLOCK}mixer.{part}.weight", attention + "linear_qkv.weight", query_groups(part), *outer)
          for part in ("q", "k", "v")),
        row(BLOCK + "mixer.o.weight", attention + "linear_proj.weight", *outer),
        row(BLOCK + "channel_norm.weight", prefix + channel_norm, *outer),
        row(MIXER + "router.weight", prefix + "mlp.router.weight", *outer),
        row(MIXER + "router.expert_bias", prefix + "mlp.router.expert_bias", *outer),
        row(MIXER + "down.weight", prefix + "mlp.linear_fc2.weight", *outer),
        row(MIXER + "shared.down.weight", prefix + shared + "linear_fc2.weight", *outer),
        row("norm.weight", "decoder.final_layernorm.weight"),
        row("head.weight", "output_layer.weight"),
        *_first(MIXER + "{part}.weight", prefix + "mlp.linear_fc1.weight", *outer, apart=apart),
        *_first(MIXER + "shared.{part}.weight", prefix + shared + "linear_fc1.weight", *outer, apart=apart),
    )


def _first(native: str, foreign: str, *outer: Transform, apart: bool = False) -> tuple[Row, ...]:
    """Write the rows of a feed-forward's first matrix, which holds gate and up, or of two matrices. native: {part}"""
    return tuple(
        row(native.replace("{part}", part), foreign + suffix, *outer) if apart else
        row(native.replace("{part}", part), foreign, half(index), *outer)
        for index, (part, suffix) in enumerate(zip(INNER, ("_w", "_v"), strict=True)))


def _experts(first: str, second: str, *outer: Transform, apart: bool = False) -> tuple[Row, ...]:
    """Write the rows of experts in layers of their own. first, second: names of the two matrices; outer: around them"""
    return (
        *_first(MIXER + "experts.{part}", first, *outer, apart=apart),
        row(MIXER + "experts.down", second, *outer),
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
        *_first(MIXER + "experts.{part}", LAYER + "mlp.experts.weight1", transposed(), grouped_columns()),
        row(MIXER + "experts.down", LAYER + "mlp.experts.weight2", transposed(), grouped_rows()),
    ),
}
RANK_NAMES = _names(LAYER, PLAIN_NORM, MOE_NORM)
OTHER_NAMES = {  # what a layer's norms are called where they are fused with the matrix behind them
    PLAIN_NORM: FUSED_NORM, MOE_NORM: DENSE_NORM,
}
STYLES = ("torch_dist", *OF_RANKS)
BALANCE = {"seq_aux_loss": "sequence", "aux_loss": "micro_batch", "global_aux_loss": "global_batch"}
POLICIES = {"position": "position", "probability": "probs"}  # ours: theirs


def ungated(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The same table for a model whose feed-forwards have one first matrix: it is not half of one."""
    return tuple(Row(found.native, found.foreign.removesuffix("_v"), found.transforms[1:])
                 if "up" in found.native else found for found in rows if "gate" not in found.native)


def read_arguments(args: Namespace, source: str) -> Config:
    """Turn the arguments that Megatron stores into a run. Raises ConfigError for what MoEScale cannot express."""
    def get(name: str, default: Any = None) -> Any:
        value = getattr(args, name, default)
        return default if value is None else value

    if not hasattr(args, "num_layers"):
        raise ConfigError(f"{source} holds no arguments of Megatron-LM's training script (`args`) that say what the "
                          "model is")
    refuse_unknown(vars(args), source)
    epsilons = {value for value in (get("norm_epsilon"), get("layernorm_epsilon")) if value is not None}
    window = get("window_size")
    for name, bad in {
        "normalization": get("normalization", "LayerNorm") != "RMSNorm", "layernorm_epsilon": len(epsilons) > 1,
        "position_embedding_type": get("position_embedding_type", "learned_absolute") not in ("rope", "none")
        and not get("use_rotary_position_embeddings", False),
        "window_size": window is not None and not _is_causal(window),
        "moe_layer_freq": not isinstance(get("moe_layer_freq", 1), (int, list, tuple)),
    }.items():
        if bad:
            raise ConfigError(f"{source}: {name}={get(name)!r} cannot be expressed by MoEScale")
    try:
        layers, heads, d_model = args.num_layers, args.num_attention_heads, args.hidden_size
        activation = "swiglu" if get("swiglu", False) else "gelu"
        mixtures = _mixtures(get("moe_layer_freq", 1), layers) if get("num_experts") else [False] * layers
        model = {
            "vocab_size": get("padded_vocab_size", get("vocab_size")), "d_model": d_model, "num_layers": layers,
            "norm_eps": epsilons.pop() if epsilons else 1e-5,
            "tied_embeddings": not get("untie_embeddings_and_output_weights", False), "pattern": shortest_pattern(
                [{"channel_mixer": "moe" if mixture else "feed_forward"} for mixture in mixtures]),
        }
        attention = {
            "num_heads": heads,
            "num_kv_heads": get("num_query_groups", heads) if get("group_query_attention", False) else heads,
            "head_dim": get("kv_channels", d_model // heads),
            "window": window[0] + 1 if window and window[0] >= 0 else None,
            "positions": "none" if get("position_embedding_type") == "none" else "rope",
            "rope_theta": float(get("rotary_base", 10000)),
        }
        groups = {"model": model, "attention": attention,
                  "feed_forward": {"d_ff": get("ffn_hidden_size", 4 * d_model), "activation": activation},
                  "data": {"seq_len": get("seq_length", 2048), "tokenizer": None}}
        if any(mixtures):
            groups["moe"] = _read_moe(get, activation, source)
            groups["moe"] |= _read_balance(get, groups["data"], source)
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"{source}: its arguments are not whole ({error})") from None
    return parse_config(groups, source)


def _mixtures(frequency: int | list[int], layers: int) -> list[bool]:
    if isinstance(frequency, int):
        return [index % frequency == 0 for index in range(layers)]
    return [bool(entry) for entry in frequency]


def _is_causal(window: Any) -> bool:
    """Say whether these are the positions before and after a query that it sees, those after it hidden anyway."""
    return isinstance(window, (list, tuple)) and len(window) == 2 and all(type(part) is int for part in window)


def _read_moe(get: Any, activation: str, source: str) -> dict[str, Any]:
    """Read what routes. Raises ConfigError for what MoEScale's routers do not compute."""
    experts, top_k = get("num_experts"), get("moe_router_topk", 2)
    score, scaling = get("moe_router_score_function", "softmax"), get("moe_router_topk_scaling_factor", 1.0)
    sigmoid, before = score == "sigmoid", get("moe_router_pre_softmax", False)
    width, shared = get("moe_ffn_hidden_size", get("ffn_hidden_size")), get("moe_shared_expert_intermediate_size", 0)
    capacity = get("moe_expert_capacity_factor", -1)
    groups = get("moe_router_num_groups", 1) if get("moe_router_group_topk") else 1
    for name, bad in {
        "moe_router_score_function": score not in ("softmax", "sigmoid"),
        "moe_router_enable_expert_bias": sigmoid != get("moe_router_enable_expert_bias", False),
        "moe_router_topk": sigmoid and top_k == 1,  # its weight would be the score as it is, not a share of one
        "moe_router_topk_scaling_factor": not sigmoid and scaling != 1,
        "moe_router_num_groups": not sigmoid and groups > 1,
        "moe_router_group_topk": groups > 1 and top_k < get("moe_router_group_topk"),
        "moe_expert_capacity_factor": capacity >= 0 and (sigmoid or not before or top_k > 1),
        "moe_token_drop_policy": get("moe_token_drop_policy", "probs") not in POLICIES.values(),
        "moe_shared_expert_intermediate_size": shared % width != 0,
    }.items():
        if bad:
            raise ConfigError(f"{source}: {name}={get(name)!r} with {score} scores and the best {top_k} of {experts} "
                              "experts cannot be expressed by MoEScale")
    moe = {
        "num_experts": experts, "top_k": top_k, "d_ff": width, "activation": activation,
        "num_shared_experts": shared // width, "router_z_coefficient": get("moe_z_loss_coeff", 0.0),
        "jitter": get("moe_input_jitter_eps", 0.0), "router": "mixtral",
    }
    if sigmoid:
        moe |= {
            "router": "sigmoid_bias", "routed_scaling": float(scaling), "num_expert_groups": groups,
            "top_k_groups": get("moe_router_group_topk", 1),
            "bias_update_rate": get("moe_router_bias_update_rate", 0.001),
        }
    elif before and top_k > 1:
        moe["normalize_weights"] = False
    elif before:
        moe["router"] = "switch"
        if capacity >= 0:
            policies = {theirs: ours for ours, theirs in POLICIES.items()}
            moe |= {"capacity_factor": capacity, "eval_capacity_factor": capacity,
                    "drop_by": policies[get("moe_token_drop_policy", "probs")]}
    return moe


def _read_balance(get: Any, data: dict[str, Any], source: str) -> dict[str, Any]:
    """Read which balance loss acts, and over which tokens. data: keys of that group, for what the scope needs

    Both losses are experts x sum over experts of share of the choices x mean probability, summed over layers, and both
    coefficients its factor beside a mean loss a token: they are equal where the tokens are.
    """
    kinds, coefficients = get("moe_router_load_balancing_type", "aux_loss"), get("moe_aux_loss_coeff", 0.0)
    if not isinstance(kinds, list):
        kinds, coefficients = [kinds], [coefficients]
    acting = dict(zip(kinds, coefficients, strict=False)) if isinstance(coefficients, list) else {}
    if len(acting) != len(kinds) or any(kind not in (*BALANCE, "none") for kind in kinds):
        raise ConfigError(f"{source}: moe_router_load_balancing_type={get('moe_router_load_balancing_type')!r} with "
                          f"moe_aux_loss_coeff={get('moe_aux_loss_coeff')!r} cannot be expressed by MoEScale")
    acting = {kind: value for kind, value in acting.items() if value and kind != "none"}
    if len(acting) > 1:
        raise ConfigError(f"{source}: moe_router_load_balancing_type={kinds}: MoEScale has one balance loss at a time")
    kind, coefficient = next(iter(acting.items()), ("seq_aux_loss", 0.0))
    scope, sequences = BALANCE[kind], get("micro_batch_size", 1)
    if kind == "aux_loss" and sequences == 1:
        scope = "sequence"
    elif kind == "aux_loss":
        data |= {"micro_batch": sequences, "global_batch": get("global_batch_size", sequences)}
    return {"load_balance_coefficient": float(coefficient), "balance_over": scope}


def write_arguments(config: Config, layout: FileLayout) -> Namespace:
    """Turn a run into the arguments that Megatron looks for in a checkpoint."""
    model, attention, moe = config.model, config.attention, config.moe
    values: dict[str, Any] = {
        "num_layers": model.num_layers, "hidden_size": model.d_model, "ffn_hidden_size": config.feed_forward.d_ff,
        "num_attention_heads": attention.num_heads, "group_query_attention": True,
        "num_query_groups": attention.num_kv_heads, "kv_channels": attention.head_dim,
        "vocab_size": model.vocab_size, "padded_vocab_size": model.vocab_size, "make_vocab_size_divisible_by": 1,
        "max_position_embeddings": config.data.seq_len, "seq_length": config.data.seq_len,
        "normalization": "RMSNorm", "norm_epsilon": model.norm_eps, "position_embedding_type": attention.positions,
        "rotary_base": attention.rope_theta, "rotary_percent": 1.0,
        "swiglu": _activation(config) == "swiglu",
        "window_size": None if attention.window is None else (attention.window - 1, 0),
        "untie_embeddings_and_output_weights": not model.tied_embeddings, "add_bias_linear": False,
        "add_qkv_bias": False, "tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep, "expert_tensor_parallel_size": layout.etp, "iteration": 0,
        "num_experts": None,
    }
    if config.num_moe_layers:
        sigmoid, switch = moe.router == "sigmoid_bias", moe.router == "switch"
        kind = next(theirs for theirs, ours in BALANCE.items() if ours == moe.balance_over)
        places = [int(layer.channel_mixer == "moe") for layer in model.layers]
        if config.data.micro_batch is not None:
            values |= {"micro_batch_size": config.data.micro_batch, "global_batch_size": config.data.global_batch}
        values |= {
            "num_experts": moe.num_experts, "moe_router_topk": moe.top_k, "moe_ffn_hidden_size": moe.d_ff,
            "moe_layer_freq": 1 if all(places) else places,  # with a list, its loader looks for layers by number
            "moe_router_score_function": "sigmoid" if sigmoid else "softmax",
            "moe_router_pre_softmax": switch or not moe.normalize_weights or (
                not sigmoid and moe.num_experts == 1),
            "moe_router_enable_expert_bias": sigmoid,
            "moe_router_bias_update_rate": moe.bias_update_rate,
            "moe_router_topk_scaling_factor": moe.routed_scaling if sigmoid else None,
            "moe_router_num_groups": moe.num_expert_groups if moe.num_expert_groups > 1 else None,
            "moe_router_group_topk": moe.top_k_groups if moe.num_expert_groups > 1 else None,
            "moe_router_load_balancing_type": kind if moe.load_balance_coefficient else "none",
            "moe_aux_loss_coeff": moe.load_balance_coefficient, "moe_z_loss_coeff": moe.router_z_coefficient or None,
            "moe_input_jitter_eps": moe.jitter or None, "moe_expert_capacity_factor": moe.eval_capacity_factor,
            "moe_token_drop_policy": POLICIES[moe.drop_by],
            "moe_shared_expert_intermediate_size": moe.num_shared_experts * moe.d_ff or None,
            "moe_grouped_gemm": layout.style != "sequential",
        }
    return Namespace(**values)


def _activation(config: Config) -> str:
    return config.moe.activation if config.num_moe_layers else config.feed_forward.activation


def inexpressible(config: Config) -> Iterator[str]:
    """Name what MoEScale can express and Megatron-Core cannot, each with its value."""
    model, moe, mixtures = config.model, config.moe, config.num_moe_layers
    attention, dense = config.attention, config.feed_forward
    groups = mixtures and moe.num_expert_groups > 1 and moe.top_k < moe.top_k_groups
    # there the weight of the only choice is its score as it is, or its share of all experts' probability, never 1
    one = mixtures and moe.top_k == 1 and moe.normalizes and (moe.router == "sigmoid_bias" or moe.num_experts > 1)
    wrong = {
        "model.residual": model.residual != "plain", "model.block": model.block != "serial",
        "model.norm": model.norm != "rmsnorm", "model.embedding_positions": model.embedding_positions != "none",
        "attention.positions": attention.positions == "alibi", "model.scale_logits": model.scale_logits,
        "feed_forward.activation": mixtures < model.num_layers and dense.activation not in ("swiglu", "gelu"),
        "moe.activation": mixtures and (moe.activation not in ("swiglu", "gelu") or (
            mixtures < model.num_layers and moe.activation != dense.activation)),
        "moe.router": mixtures and moe.router not in ("mixtral", "switch", "sigmoid_bias"),
        "moe.top_k_groups": groups, "moe.top_k": one,
        "moe.left_behind_choices": mixtures and moe.left_behind_choices > 1,
        "moe.eval_capacity_factor": mixtures and moe.eval_capacity_factor not in (None, moe.capacity_factor),
    }
    for key, bad in wrong.items():
        if bad:
            group, name = key.split(".")
            beside = f" with moe.router={moe.router}" if key in ("moe.top_k", "moe.top_k_groups") else ""
            yield f"{key}={getattr(getattr(config, group), name)}{beside}"


def refuse(config: Config, layout: FileLayout, dtype: torch.dtype | None) -> None:
    """Refuse by name what Megatron-Core cannot express, and files that cannot be cut so."""
    for named in inexpressible(config):
        raise ConfigError(f"{named} cannot be expressed by Megatron-Core: convert --to moescale or deepspeed")
    model, attention, moe, mixtures = config.model, config.attention, config.moe, config.num_moe_layers
    if layout.style not in (None, *STYLES):
        raise ConfigError(f"--style {layout.style}: a Megatron checkpoint is {', '.join(STYLES)}")
    if layout.style == "torch_dist" and layout != FileLayout(style="torch_dist"):
        raise ConfigError("--style torch_dist is not cut by a layout, and loads in every one: leave out --ep, --tp, "
                          "--pp and --etp, or write --style sequential, grouped or te_grouped")
    sizes = {"attention.num_kv_heads": (attention.num_kv_heads, "tp"), "model.vocab_size": (model.vocab_size, "tp"),
             "model.num_layers": (model.num_layers, "pp")}
    if mixtures:
        sizes |= {"moe.num_experts": (moe.num_experts, "ep"), "moe.d_ff": (moe.d_ff, "etp"), "--tp": (layout.tp, "etp")}
    if mixtures < model.num_layers:
        sizes["feed_forward.d_ff"] = (config.feed_forward.d_ff, "tp")
    for name, (size, key) in sizes.items():
        degree = getattr(layout, key)
        if size % degree:
            raise ConfigError(f"--{key} {degree} must divide {name}={size}")
