"""Hugging Face checkpoints: Mixtral, and Llama and Mistral as dense models, as sharded safetensors with config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moescale.checkpoint.containers import Sizes, create_safetensors, inside, open_safetensors
from moescale.checkpoint.mapped import Layout, Opened
from moescale.checkpoint.native import native_atoms
from moescale.checkpoint.region import Shape, Stored
from moescale.checkpoint.table import At, Piece, Row, half, matches, piece, row, stacked_experts
from moescale.config import Config, ConfigError, parse_config

NAME = "hf"
COMMON = (
    row("embedding.weight", "model.embed_tokens.weight"),
    row("blocks.{layer}.mixer_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
    row("blocks.{layer}.mixer.q.weight", "model.layers.{layer}.self_attn.q_proj.weight"),
    row("blocks.{layer}.mixer.k.weight", "model.layers.{layer}.self_attn.k_proj.weight"),
    row("blocks.{layer}.mixer.v.weight", "model.layers.{layer}.self_attn.v_proj.weight"),
    row("blocks.{layer}.mixer.o.weight", "model.layers.{layer}.self_attn.o_proj.weight"),
    row("blocks.{layer}.channel_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
    row("blocks.{layer}.channel_mixer.gate.weight", "model.layers.{layer}.mlp.gate_proj.weight"),
    row("blocks.{layer}.channel_mixer.up.weight", "model.layers.{layer}.mlp.up_proj.weight"),
    row("blocks.{layer}.channel_mixer.down.weight", "model.layers.{layer}.mlp.down_proj.weight"),
    row("norm.weight", "model.norm.weight"),
    row("head.weight", "lm_head.weight"),
)
MIXTURE, MOE = "blocks.{layer}.channel_mixer.", "model.layers.{layer}.block_sparse_moe."
EXPERTS = (  # as published
    row(MIXTURE + "router.weight", MOE + "gate.weight"),
    row(MIXTURE + "experts.gate.{expert}", MOE + "experts.{expert}.w1.weight"),
    row(MIXTURE + "experts.up.{expert}", MOE + "experts.{expert}.w3.weight"),
    row(MIXTURE + "experts.down.{expert}", MOE + "experts.{expert}.w2.weight"),
)
FUSED = "model.layers.{layer}.mlp."
FUSED_EXPERTS = (  # as transformers 5 holds them
    row(MIXTURE + "router.weight", FUSED + "gate.weight"),
    row(MIXTURE + "experts.gate.{expert}", FUSED + "experts.gate_up_proj", half(0), stacked_experts()),
    row(MIXTURE + "experts.up.{expert}", FUSED + "experts.gate_up_proj", half(1), stacked_experts()),
    row(MIXTURE + "experts.down.{expert}", FUSED + "experts.down_proj", stacked_experts()),
)
STYLES = {"published": EXPERTS, "fused": FUSED_EXPERTS}
LEFT_OUT = {r".*\.rotary_emb\.inv_freq": "it follows from rope_theta"}
ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu"}
LARGEST_FILE = 5_000_000_000  # bytes
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def detect(path: Path) -> bool:
    return (path / "config.json").is_file() and any(path.glob("*.safetensors*"))


def open_checkpoint(path: Path) -> Opened:
    """Open a folder of safetensors with its config.json. Raises ConfigError."""
    values = _read_json(path / "config.json")
    tensors = _open_tensors(path)
    files = {name: (path / name).read_text(encoding="utf-8") for name in ("tokenizer.json",) if (path / name).is_file()}
    config = read_config(values, str(path / "config.json"), tokenizer="tokenizer.json" in files)
    atoms = native_atoms(config)
    left_out = {name: why for name in tensors for pattern, why in LEFT_OUT.items() if re.fullmatch(pattern, name)}
    style = "fused" if any(name.endswith("experts.gate_up_proj") for name in tensors) else "published"
    pieces = _pieces(config, atoms, STYLES[style])
    if config.model.tied_embeddings and "lm_head.weight" in tensors:
        tied = next(found for found in pieces if found.native == "embedding.weight")
        pieces.append(Piece(tied.native, tied.part, "lm_head.weight", tied.shape, tied.place, copy=True))
    return Opened(NAME, path, config, Layout(style=style), atoms, tensors, pieces, left_out, files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no JSON object")
    return values


def _open_tensors(path: Path) -> dict[str, Stored]:
    """Read the headers of all files, and hold them to the index."""
    index = _read_json(path / INDEX).get("weight_map") if (path / INDEX).exists() else None
    if index is None:
        names = sorted(file.name for file in path.glob("*.safetensors"))
        if not names:
            raise ConfigError(f"{path} holds no .safetensors")
    elif not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ConfigError(f"{path / INDEX} has no weight_map of names")
    else:
        names = sorted(set(index.values()))
    tensors: dict[str, Stored] = {}
    for name in names:
        found = open_safetensors(inside(path, name))[0]
        twice = found.keys() & tensors.keys()
        if twice:
            raise ConfigError(f"{path} holds {min(twice)} twice, in {name} and in another file")
        wrong = [key for key in found if index is not None and index.get(key) != name]
        if wrong:
            raise ConfigError(f"{path}: {wrong[0]} lies in {name}, but {INDEX} does not say so")
        tensors.update(found)
    missing = [key for key in index or {} if key not in tensors]
    if missing:
        raise ConfigError(f"{path} is not whole: {missing[0]} is missing in {(index or {})[missing[0]]}")
    return tensors


def _pieces(config: Config, atoms: Mapping[str, Shape], experts: Sequence[Row]) -> list[Piece]:
    found = []
    for entry, native, layer, expert in matches((*COMMON, *experts), atoms, config):
        key = entry.foreign.format(layer=layer, expert=expert)
        at = At(config, layer, expert, config.moe.num_experts, config.model.num_layers)
        found.append(piece(entry, atoms[native], native, key, at))
    return found


def read_config(values: Mapping[str, Any], source: str, tokenizer: bool) -> Config:
    """Turn a config.json into a run. Raises ConfigError for what MoEScale cannot express."""
    kind = values.get("model_type")
    if kind not in ("mixtral", "mistral", "llama"):
        raise ConfigError(f"{source}: model_type {kind!r} is not known; mixtral, mistral and llama are")
    rope = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    for key, bad in {
        "attention_bias": bool(values.get("attention_bias")), "mlp_bias": bool(values.get("mlp_bias")),
        "rope_type": rope_type != "default", "hidden_act": values.get("hidden_act", "silu") not in ACTIVATIONS,
    }.items():
        if bad:
            raise ConfigError(f"{source}: {key}={rope_type if key == 'rope_type' else values.get(key)!r} cannot be "
                              "expressed by MoEScale")
    try:
        heads, d_model, vocab = values["num_attention_heads"], values["hidden_size"], values["vocab_size"]
        activation = ACTIVATIONS[values.get("hidden_act", "silu")]
        model = {
            "vocab_size": vocab, "d_model": d_model, "num_layers": values["num_hidden_layers"], "num_heads": heads,
            "num_kv_heads": values.get("num_key_value_heads") or heads,
            "head_dim": values.get("head_dim") or d_model // heads,
            "window": None if kind == "llama" else values.get("sliding_window"),
            "rope_theta": float(rope.get("rope_theta", values.get("rope_theta", 1e4))),
            "norm_eps": values.get("rms_norm_eps", 1e-5), "tied_embeddings": values.get("tie_word_embeddings", False),
            "activation": activation,
        }
        groups: dict[str, Any] = {"model": model, "data": {"seq_len": values.get("max_position_embeddings", 2048),
                                                           "tokenizer": "bytes"}}
        if tokenizer or vocab < 257:
            groups["data"]["tokenizer"] = "tokenizer.json"
        if kind == "mixtral":
            groups["moe"] = {
                "num_experts": values["num_local_experts"], "top_k": values["num_experts_per_tok"],
                "d_ff": values["intermediate_size"], "activation": activation,
                "jitter": values.get("router_jitter_noise", 0.0),
                "load_balance_coefficient": values.get("router_aux_loss_coef", 0.001),
            }
        else:
            model |= {"d_ff": values["intermediate_size"], "pattern": [{"channel_mixer": "feed_forward"}]}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{source} lacks {error}") from None
    return parse_config(groups, source)


def refuse(config: Config, layout: Layout, dtype: torch.dtype | None) -> None:
    """Refuse by name what MoEScale can express and Hugging Face's Mixtral, Mistral and Llama cannot."""
    model, moe = config.model, config.moe
    dense = config.num_moe_layers == 0
    wrong = {
        "model.block": model.block != "serial", "model.norm": model.norm != "rmsnorm",
        "model.positions": model.positions != "rope", "model.scale_logits": model.scale_logits,
        "model.activation": dense and model.activation not in ACTIVATIONS.values(),
        "model.pattern": not dense and config.num_moe_layers < model.num_layers,
        "moe.router": not dense and moe.router != "mixtral",
        "moe.num_shared_experts": not dense and moe.num_shared_experts > 0,
        "moe.activation": not dense and moe.activation not in ACTIVATIONS.values(),
    }
    for key, bad in wrong.items():
        if bad:
            group, name = key.split(".")
            value = getattr(getattr(config, group), name)
            shown = " with dense and moe layers" if name == "pattern" else f"={value}"
            raise ConfigError(f"{key}{shown} cannot be expressed by Hugging Face's Mixtral, Mistral and Llama: convert "
                              "--to moescale, megatron or deepspeed")
    if layout.style not in (None, *STYLES):
        raise ConfigError(f"--style {layout.style}: a Hugging Face checkpoint is {' or '.join(STYLES)}")
    if layout != Layout(style=layout.style):
        raise ConfigError("a Hugging Face checkpoint is not cut by a layout: leave out --ep, --tp, --pp and --etp")


def plan(config: Config, layout: Layout, atoms: Mapping[str, Shape]) -> list[Piece]:
    return _pieces(config, atoms, STYLES[layout.style or "published"])


def create(
    folder: Path, config: Config, layout: Layout, pieces: Sequence[Piece], sizes: Sizes, opened: Opened
) -> dict[str, Stored]:
    """Lay out the files, each of at most LARGEST_FILE or one tensor, with index and config.json."""
    shards: list[dict[str, tuple[Shape, torch.dtype]]] = [{}]
    total = filled = 0
    for name, (shape, dtype) in sizes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and filled + size > LARGEST_FILE:
            shards.append({})
            filled = 0
        shards[-1][name] = (shape, dtype)
        filled, total = filled + size, total + size
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    tensors: dict[str, Stored] = {}
    for file, shard in zip(names, shards, strict=True):
        tensors.update(create_safetensors(folder / file, shard))
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / "config.json", write_config(config, next(iter(sizes.values()))[1]))
    for name, text in opened.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return tensors


def finish(folder: Path, opened: Opened) -> None:
    """Nothing is left to do."""


def write_config(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Turn a run into config.json, as transformers 4 and 5 read it."""
    model, moe = config.model, config.moe
    dense = config.num_moe_layers == 0
    kind = "mixtral" if not dense else "llama" if model.window is None else "mistral"
    activation = model.activation if dense else moe.activation
    values: dict[str, Any] = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind, "vocab_size": model.vocab_size,
        "hidden_size": model.d_model, "intermediate_size": model.d_ff if dense else moe.d_ff,
        "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[activation],
        "max_position_embeddings": config.data.seq_len, "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta, "tie_word_embeddings": model.tied_embeddings, "attention_dropout": 0.0,
        "torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": None, "eos_token_id": None,
    }
    if kind == "llama":
        values |= {"attention_bias": False, "mlp_bias": False}
    else:
        values["sliding_window"] = model.window
    if not dense:
        values |= {
            "num_local_experts": moe.num_experts, "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.load_balance_coefficient, "router_jitter_noise": moe.jitter,
        }
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
