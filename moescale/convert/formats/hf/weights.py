"""Hugging Face checkpoints: Mixtral, and Llama and Mistral as dense models, as sharded safetensors with config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from moescale.checkpoint.region import Shape, Stored
from moescale.config import Config, ConfigError
from moescale.convert.companions import carried_config, write_json
from moescale.convert.containers import Sizes, create_safetensors, inside
from moescale.convert.formats.hf.config import read_config, read_notes, write_config
from moescale.convert.formats.hf.folder import CONFIG, INDEX, SINGLE, detect, open_tensors, read_json
from moescale.convert.formats.native import native_weights
from moescale.convert.mapping.mapped import Layout, Opened
from moescale.convert.mapping.table import At, Piece, Row, half, matches, piece, row, stacked_experts

NAME = "hf"
__all__ = ["NAME", "create", "detect", "finish", "open_checkpoint", "plan", "refuse"]
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
LEFT_OUT = {r"(.*\.)?rotary_emb\.inv_freq": "it follows from rope_theta"}
GATED = ("swiglu", "geglu")
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_FILE = 5_000_000_000  # bytes


def open_checkpoint(path: Path) -> Opened:
    """Open a folder of safetensors with its config.json. Raises ConfigError."""
    source = path / CONFIG
    values = read_json(inside(path, CONFIG))
    config = read_config(values, str(source), None)
    tensors, notes = open_tensors(path)
    weights = native_weights(config)
    left_out = {name: why for name in tensors for pattern, why in LEFT_OUT.items() if re.fullmatch(pattern, name)}
    odd = next((name for name, stored in tensors.items() if name not in left_out and stored.dtype not in WEIGHTS), None)
    if odd is not None:
        raise ConfigError(f"{path}: {odd} has dtype {str(tensors[odd].dtype).removeprefix('torch.')}, and weights are "
                          "float32, bfloat16 or float16: save the model as one of these")
    style = "fused" if any(name.endswith("experts.gate_up_proj") for name in tensors) else "published"
    pieces = _pieces(config, weights, STYLES[style])
    if config.model.tied_embeddings and "lm_head.weight" in tensors:
        tied = next(found for found in pieces if found.native == "embedding.weight")
        pieces.append(Piece(tied.native, tied.part, "lm_head.weight", tied.shape, tied.place, copy=True))
    return Opened(NAME, path, config, Layout(style=style), weights, tensors, pieces, left_out,
                  notes=[*notes, *read_notes(values)])


def _pieces(config: Config, weights: Mapping[str, Shape], experts: Sequence[Row]) -> list[Piece]:
    found = []
    for entry, native, layer, expert in matches((*COMMON, *experts), weights, config):
        key = entry.foreign.format(layer=layer, expert=expert)
        at = At(config, layer, expert, config.moe.num_experts, config.model.num_layers)
        found.append(piece(entry, weights[native], native, key, at))
    return found


def refuse(config: Config, layout: Layout, dtype: torch.dtype | None) -> None:
    """Refuse by name what MoEScale can express and Hugging Face's Mixtral, Mistral and Llama cannot."""
    model, moe = config.model, config.moe
    dense = config.num_moe_layers == 0
    wrong = {
        "model.block": model.block != "serial", "model.norm": model.norm != "rmsnorm",
        "model.positions": model.positions != "rope", "model.scale_logits": model.scale_logits,
        "model.activation": dense and model.activation not in GATED,
        "model.num_heads": dense and model.window is None and model.d_model % model.num_heads > 0,
        "model.pattern": not dense and config.num_moe_layers < model.num_layers,
        "moe.router": not dense and moe.router != "mixtral",
        "moe.num_shared_experts": not dense and moe.num_shared_experts > 0,
        "moe.activation": not dense and moe.activation not in GATED,
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


def plan(config: Config, layout: Layout, weights: Mapping[str, Shape]) -> list[Piece]:
    return _pieces(config, weights, STYLES[layout.style or "published"])


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
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / CONFIG, write_config(config, next(iter(sizes.values()))[1], carried_config(opened.files)))
    return tensors


def finish(folder: Path, opened: Opened) -> None:
    """Nothing is left to do."""
