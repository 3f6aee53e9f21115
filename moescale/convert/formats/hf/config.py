"""What a config.json of Mixtral, Mistral or Llama says of the model, in both directions.

Every key is one of four: it is read, it has a neutral value and is refused at any other, it is known to say nothing of
what the model computes, or it is refused because nobody knows. A key that is absent has the default of its model_type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moescale.config import Config, ConfigError, parse_config

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_python": "geglu"}
LONGEST = 4096  # tokens of a training sequence, where the source does not say less
COMMON: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": None,
    "hidden_act": "silu", "tie_word_embeddings": False, "rope_scaling": None, "rope_parameters": None,
    "layer_types": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {  # what transformers' configuration classes put for a key that is absent
    "mixtral": {
        **COMMON, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8,
        "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    },
    "mistral": {
        **COMMON, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
    },
    "llama": {
        **COMMON, "intermediate_size": 11008, "num_key_value_heads": None, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    },
}
NEUTRAL: dict[str, Any] = {  # changes nothing at this value, or at null
    "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0, "sliding_window": None,
    "quantization_config": None, "compression_config": None, "auto_map": None, "pruned_heads": {},
    "is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False, "chunk_size_feed_forward": 0, "hidden_dropout": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_multiplier": 1.0,
    "residual_multiplier": 1.0, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "logit_scale": 1.0,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "use_qk_norm": False, "qk_norm": False,
    "num_nextn_predict_layers": 0, "rope_interleaved": False, "is_causal": True,
}
HARMLESS = frozenset({  # say nothing of what the model computes
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
    "pretraining_tp", "attention_dropout", "output_router_logits", "output_attentions", "output_hidden_states",
    "output_scores", "return_dict", "return_dict_in_generate", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "_name_or_path", "name_or_path", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "tokenizer_class", "prefix", "_attn_implementation", "attn_implementation",
    "_attn_implementation_autoset", "_flash_attn_2_enabled", "use_flash_attention", "use_flash_attn", "_commit_hash",
    "unsloth_fixed", "unsloth_version", "unsloth_tensor_names", "model_max_length", "tokenizer_model_max_length",
    "max_sequence_length", "max_seq_length", "is_llama_config",
    "neftune_noise_alpha", "gradient_checkpointing", "transformers.js_config", "bos_token_id", "eos_token_id",
    "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id", "mask_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "early_stopping", "max_length",
    "min_length", "num_beams", "num_beam_groups", "num_return_sequences", "remove_invalid_values",
    "exponential_decay_length_penalty",
})
# attention_dropout: transformers drops in training alone, and MoEScale trains without, as a note says.
# pretraining_tp: cuts products into parts that are added up, the same sums.
# output_router_logits: whether transformers' own training adds the balance loss at all.
NOT_LOOKED_AT = frozenset({"max_window_layers", "use_sliding_window"})  # where there is no window


def read_config(values: Mapping[str, Any], source: str, tokenizer: str | None) -> Config:
    """Turn a config.json into a run. Raises ConfigError for what MoEScale cannot express.

    source: names the file in errors. tokenizer: of the run that is made; None where the model carries none.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ConfigError(f"{source}: model_type {kind!r} is not known; mixtral, mistral and llama are")
    values = _with_one_name(values, source) if kind == "mixtral" else values
    window = _integer_or_null(values, "sliding_window", kind, source) if kind != "llama" else None
    if window == 0:
        raise ConfigError(f"{source}: sliding_window=0 lets a query see nothing: write null for no window")
    _refuse_unknown(values, kind, window, source)
    heads = _integer(values, "num_attention_heads", kind, source)
    d_model = _integer(values, "hidden_size", kind, source)
    layers = _integer(values, "num_hidden_layers", kind, source)
    d_ff = _integer(values, "intermediate_size", kind, source)
    if min(heads, d_model, layers) < 1:
        raise ConfigError(f"{source}: num_attention_heads, hidden_size and num_hidden_layers must be at least 1")
    _check_layer_types(values.get("layer_types"), layers, window, source)
    act = values.get("hidden_act", DEFAULTS[kind]["hidden_act"])
    activation = ACTIVATIONS.get(act) if isinstance(act, str) else None
    if activation is None:
        raise ConfigError(f"{source}: hidden_act={act!r} cannot be expressed by MoEScale: "
                          f"only {', '.join(ACTIVATIONS)} can")
    tied = values.get("tie_word_embeddings", DEFAULTS[kind]["tie_word_embeddings"])
    if not isinstance(tied, bool):
        raise ConfigError(f"{source}: tie_word_embeddings={tied!r} must be true or false")
    positions = _integer(values, "max_position_embeddings", kind, source)
    model: dict[str, Any] = {
        "vocab_size": _integer(values, "vocab_size", kind, source), "d_model": d_model, "num_layers": layers,
        "num_heads": heads, "num_kv_heads": _integer_or_null(values, "num_key_value_heads", kind, source) or heads,
        "head_dim": _integer_or_null(values, "head_dim", kind, source) or d_model // heads, "window": window,
        "rope_theta": _rope_theta(values, kind, source), "norm_eps": _number(values, "rms_norm_eps", kind, source),
        "tied_embeddings": tied, "activation": activation,
    }
    groups: dict[str, Any] = {"model": model, "data": {"seq_len": max(1, min(positions, LONGEST)),
                                                       "tokenizer": tokenizer}}
    if kind == "mixtral":
        top_k = _integer(values, "num_experts_per_tok", kind, source)
        theirs = _number(values, "router_aux_loss_coef", kind, source)
        groups["moe"] = {
            "num_experts": _integer(values, "num_local_experts", kind, source), "top_k": top_k, "d_ff": d_ff,
            "activation": activation, "jitter": _number(values, "router_jitter_noise", kind, source),
            "load_balance_coefficient": _rounded(theirs * top_k / layers), "balance_over": "global_batch",
        }
    else:
        model |= {"d_ff": d_ff, "pattern": [{"channel_mixer": "feed_forward"}]}
    return parse_config(groups, source)


def _rounded(value: float) -> float:
    """Take off what a product and a quotient leave in the last digits."""
    return float(f"{value:.12g}")


def read_notes(values: Mapping[str, Any]) -> list[str]:
    """Say what of a config.json concerns training, and is done otherwise here."""
    notes = []
    if values.get("attention_dropout"):
        notes.append(f"attention_dropout={values['attention_dropout']} is not applied: MoEScale trains without")
    if values.get("router_jitter_noise"):
        notes.append(f"router_jitter_noise={values['router_jitter_noise']} became moe.jitter, of which the router's "
                     "input alone is multiplied; transformers multiplies what the experts get, too")
    return notes


def _with_one_name(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Give the number of experts its one name; transformers takes another, too."""
    found = dict(values)
    if "num_experts" in found:
        other = found.pop("num_experts")
        if found.setdefault("num_local_experts", other) != other:
            raise ConfigError(f"{source}: num_experts={other!r} and num_local_experts={found['num_local_experts']!r} "
                              "are two names of one number: leave out the wrong one")
    return found


def _refuse_unknown(values: Mapping[str, Any], kind: str, window: int | None, source: str) -> None:
    for key, value in values.items():
        if key in DEFAULTS[kind] or key in HARMLESS or (key in NOT_LOOKED_AT and window is None):
            continue
        neutral = NEUTRAL.get(key)
        if value is None or (key in NEUTRAL and value == neutral):
            continue
        if key in ("quantization_config", "compression_config"):
            raise ConfigError(f"{source}: {key}={_short(value)}: quantized weights cannot be converted: take the "
                              "bfloat16 ones, or load these with transformers, dequantize() and save_pretrained(...)")
        if key == "auto_map":
            raise ConfigError(f"{source}: auto_map={_short(value)}: the model has code of its own, which is not run: "
                              f"take the key out if the {kind} of transformers computes the same")
        if key in NEUTRAL:
            raise ConfigError(f"{source}: {key}={_short(value)} cannot be expressed by MoEScale: only "
                              f"{'null' if neutral is None else str(neutral).lower()} can")
        raise ConfigError(f"{source}: nobody here knows what {key}={_short(value)} does to a {kind}: take the key out "
                          "if the model computes the same without it")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _integer_or_null(values: Mapping[str, Any], key: str, kind: str, source: str) -> int | None:
    return None if values.get(key, DEFAULTS[kind][key]) is None else _integer(values, key, kind, source)


def _integer(values: Mapping[str, Any], key: str, kind: str, source: str) -> int:
    value = values.get(key, DEFAULTS[kind][key])
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{source}: {key}={_short(value)} must be a whole number, e.g. {DEFAULTS[kind][key] or 8}")
    return value


def _number(values: Mapping[str, Any], key: str, kind: str, source: str) -> float:
    value = values.get(key, DEFAULTS[kind][key])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{source}: {key}={_short(value)} must be a number, e.g. {DEFAULTS[kind][key]}")
    return float(value)


def _rope_theta(values: Mapping[str, Any], kind: str, source: str) -> float:
    """Read the base of the rotary embedding, of which only the plain kind can be expressed."""
    found = {key: values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key)}
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        raise ConfigError(f"{source}: rope_scaling and rope_parameters differ, and versions of transformers read one "
                          "or the other: leave out the wrong one")
    theta = _number(values, "rope_theta", kind, source)
    for name, rope in found.items():
        plain = {"rope_type": "default", "type": "default", "factor": 1.0, "partial_rotary_factor": 1.0}
        odd = [key for key, value in rope.items() if key not in ("rope_theta", "original_max_position_embeddings")
               and (key not in plain or value not in (None, plain[key]))] if isinstance(rope, dict) else [name]
        if odd:
            raise ConfigError(f"{source}: {name}={_short(rope)} cannot be expressed by MoEScale: only rope_type "
                              "default can, with a rope_theta")
        if rope.get("rope_theta") is not None:
            inner = _number(rope, "rope_theta", kind, source)
            if "rope_theta" in values and inner != theta:
                raise ConfigError(f"{source}: rope_theta={theta} and {name}.rope_theta={inner} differ, and versions of "
                                  "transformers read one or the other: leave out the wrong one")
            theta = inner
    return theta


def _check_layer_types(types: Any, layers: int, window: int | None, source: str) -> None:
    """All layers see the same positions here; `layer_types` may say so, and nothing else."""
    if types is None:
        return
    wanted = "full_attention" if window is None else "sliding_attention"
    if not isinstance(types, list) or types != [wanted] * layers:
        raise ConfigError(f"{source}: layer_types={_short(types)} with sliding_window="
                          f"{'null' if window is None else window} cannot be expressed by MoEScale: only "
                          f"{layers} times {wanted} can")


def write_config(config: Config, dtype: torch.dtype, carried: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a run into config.json, as transformers 4 and 5 read it.

    carried: the config.json that came with the model or its tokenizer; what it says beside the model stays, if it is
    of the same model.
    """
    model, moe = config.model, config.moe
    dense = config.num_moe_layers == 0
    kind = "mixtral" if not dense else "llama" if model.window is None else "mistral"
    activation = model.activation if dense else moe.activation
    values: dict[str, Any] = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind, "vocab_size": model.vocab_size,
        "hidden_size": model.d_model, "intermediate_size": model.d_ff if dense else moe.d_ff,
        "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim,
        "hidden_act": {"swiglu": "silu", "geglu": "gelu"}[activation],
        "max_position_embeddings": config.data.seq_len, "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta, "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if kind == "llama":
        values |= {"attention_bias": False, "mlp_bias": False}
    else:
        values["sliding_window"] = model.window
    if not dense:
        values |= {
            "num_local_experts": moe.num_experts, "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": _rounded(moe.load_balance_coefficient * model.num_layers / moe.top_k),
            "router_jitter_noise": moe.jitter,
        }
    values["attention_dropout"] = 0.0
    if not _same_model(carried, values):
        return values
    values["max_position_embeddings"] = max(config.data.seq_len, int(carried.get("max_position_embeddings") or 0))
    kept = {key: value for key, value in carried.items() if key in HARMLESS and key not in ("dtype", "_name_or_path")
            and (key not in values or key == "attention_dropout")}
    return {**values, **kept}


def _same_model(carried: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Say whether a config.json that was carried along is of the model that is written."""
    try:
        theirs = read_config(carried, "carried", None)
    except ConfigError:
        return False
    return theirs.model == read_config(values, "written", None).model


def write_notes(config: Config) -> list[str]:
    """Say what of a run transformers, or llama.cpp after it, does otherwise."""
    model, moe, notes = config.model, config.moe, []
    if config.num_moe_layers and moe.load_balance_coefficient and moe.balance_over == "sequence":
        notes.append("router_aux_loss_coef weighs as much as moe.load_balance_coefficient, but transformers takes that "
                     "loss over all tokens of a pass, this run over each sequence")
    if config.num_moe_layers and moe.jitter:
        notes.append(f"moe.jitter={moe.jitter} became router_jitter_noise, with which transformers multiplies what the "
                     "experts get, too")
    for key, value in (("moe.router_z_coefficient", moe.router_z_coefficient),
                       ("model.z_loss_coefficient", model.z_loss_coefficient),
                       ("moe.expert_dropout", moe.expert_dropout)):
        if value:
            notes.append(f"{key}={value} has no counterpart in transformers, which trains on without it")
    if model.window is not None:
        notes.append(f"llama.cpp knows no window for these models: its answers hold for the first {model.window} "
                     "positions")
    if (moe if config.num_moe_layers else model).activation == "geglu":
        notes.append("llama.cpp takes silu whatever hidden_act says: do not use this model there")
    return notes
