"""What a config.json says of the model, in both directions.

Every key is one of four: it is in its family's table, it has a neutral value and is refused at any other, it is known
to say nothing of what the model computes, or it is refused because nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moescale.config import Config, ConfigError, parse_config
from moescale.convert.formats.hf.base import ConfigJson, shorten
from moescale.convert.formats.hf.families import FAMILIES, family_of, titles

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
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"{source}: model_type {kind!r} is not known; {titles(list(FAMILIES))} are")
    family = FAMILIES[kind]
    found = ConfigJson(values, family, source)
    _refuse_unknown(found, kind)
    groups = family.read(found)
    groups["data"]["tokenizer"] = tokenizer
    return parse_config(groups, source)


def read_notes(values: Mapping[str, Any]) -> list[str]:
    """Say what of a config.json concerns training, and is done otherwise here."""
    notes = []
    if values.get("attention_dropout"):
        notes.append(f"attention_dropout={values['attention_dropout']} is not applied: MoEScale trains without")
    if values.get("router_jitter_noise"):
        notes.append(f"router_jitter_noise={values['router_jitter_noise']} became moe.jitter, of which the router's "
                     "input alone is multiplied; transformers multiplies what the experts get, too")
    return notes


def _refuse_unknown(values: ConfigJson, kind: str) -> None:
    """Refuse keys that are not in the family's table, unless they say nothing."""
    for key, value in values.values.items():
        if key in values.defaults or key in HARMLESS or (key in NOT_LOOKED_AT and values.window() is None):
            continue
        if value is None or (key in NEUTRAL and value == NEUTRAL[key]):
            continue
        given = f"{key}={shorten(value)}"
        if key in ("quantization_config", "compression_config"):
            values.refuse(f"{given}: quantized weights cannot be converted: take the bfloat16 ones, or load these with "
                          "transformers, dequantize() and save_pretrained(...)")
        if key == "auto_map":
            values.refuse(f"{given}: the model has code of its own, which is not run: take the key out if the {kind} "
                          "of transformers computes the same")
        if key in NEUTRAL:
            only = "null" if NEUTRAL[key] is None else str(NEUTRAL[key]).lower()
            values.refuse(f"{given} cannot be expressed by MoEScale: only {only} can")
        values.refuse(f"nobody here knows what {given} does to a {kind}: take the key out if the model computes the "
                      "same without it")


def write_config(config: Config, dtype: torch.dtype, carried: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a run into config.json, as transformers 4 and 5 read it.

    carried: the config.json that came with the model or its tokenizer; what it says beside the model stays, if it is
    of the same model.
    """
    values = {**family_of(config).write(config), "torch_dtype": str(dtype).removeprefix("torch."),
              "attention_dropout": 0.0}
    if not _same_model(carried, values):
        return values
    if "max_position_embeddings" in values:
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
    window = config.attention.window
    if window is not None:
        notes.append(f"llama.cpp knows no window for these models: its answers hold for the first {window} positions")
    if (moe if config.num_moe_layers else config.feed_forward).activation == "geglu":
        notes.append("llama.cpp takes silu whatever hidden_act says: do not use this model there")
    return notes
