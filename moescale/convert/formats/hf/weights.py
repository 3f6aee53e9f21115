"""Hugging Face checkpoints: sharded safetensors with config.json, of the families of `families.py`."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from pathlib import Path

import torch

from moescale.checkpoint.strided_view import Shape, Stored
from moescale.config import Config, ConfigError
from moescale.convert.companions import carried_config, write_json
from moescale.convert.containers import Sizes, create_safetensors, inside
from moescale.convert.formats.hf.base import STYLES, Family
from moescale.convert.formats.hf.config import read_config, read_notes, write_config
from moescale.convert.formats.hf.families import FAMILIES, family_of
from moescale.convert.formats.hf.folder import CONFIG, INDEX, SINGLE, detect, open_tensors, read_object
from moescale.convert.formats.native import native_weights
from moescale.convert.mapping.mapped import FileLayout, Opened
from moescale.convert.mapping.table import At, Piece, Row, Weights, matches, piece

NAME = "hf"
__all__ = ["NAME", "create", "detect", "finish", "open_checkpoint", "plan", "refuse"]
LEFT_OUT = {r"(.*\.)?rotary_emb\.inv_freq": "it follows from rope_theta"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_FILE = 5_000_000_000  # bytes


def open_checkpoint(path: Path) -> Opened:
    """Open a folder of safetensors with its config.json. Raises ConfigError."""
    source = path / CONFIG
    values = read_object(inside(path, CONFIG))
    config = read_config(values, str(source), None)
    tensors, notes = open_tensors(path)
    weights = native_weights(config)
    left_out = {name: why for name in tensors for pattern, why in LEFT_OUT.items() if re.fullmatch(pattern, name)}
    odd = next((name for name, stored in tensors.items() if name not in left_out and stored.dtype not in DTYPES), None)
    if odd is not None:
        raise ConfigError(f"{path}: {odd} has dtype {str(tensors[odd].dtype).removeprefix('torch.')}, and weights are "
                          "float32, bfloat16 or float16: save the model as one of these")
    family = FAMILIES[values["model_type"]]
    style = _style(family, config, weights, tensors)
    pieces = _pieces(config, weights, family.table(style))
    if config.model.tied_embeddings and "lm_head.weight" in tensors:
        tied = next(found for found in pieces if found.native.weight == ("embedding", "weight"))
        pieces.append(Piece(tied.native, tied.part, "lm_head.weight", tied.shape, tied.region, copy=True))
    return Opened(NAME, path, config, FileLayout(style=style), weights, tensors, pieces, left_out,
                  notes=[*notes, *read_notes(values)])


def _style(family: Family, config: Config, weights: Weights, names: Container[str]) -> str:
    """Find the style of which most tensors are there. names: of the tensors"""

    def count(style: str) -> int:
        return sum(entry.foreign.format(layer=native.layer, expert=native.expert) in names
                   for entry, native in matches(family.table(style), weights, config))

    return max(STYLES, key=count)


def _pieces(config: Config, weights: Weights, rows: Sequence[Row]) -> list[Piece]:
    found = []
    for entry, native in matches(rows, weights, config):
        layer, expert = native.layer or 0, native.expert or 0
        key = entry.foreign.format(layer=layer, expert=expert)
        at = At(config, layer, expert, config.moe.num_experts, config.model.num_layers)
        found.append(piece(entry, native, weights[native], key, at))
    return found


def refuse(config: Config, layout: FileLayout, dtype: torch.dtype | None) -> None:
    """Refuse by name what MoEScale can express and the families of Hugging Face cannot. Raises ConfigError."""
    family_of(config)
    if layout.style not in (None, *STYLES):
        raise ConfigError(f"--style {layout.style}: a Hugging Face checkpoint is {' or '.join(STYLES)}")
    if layout != FileLayout(style=layout.style):
        raise ConfigError("a Hugging Face checkpoint is not cut by a layout: leave out --ep, --tp, --pp and --etp")


def plan(config: Config, layout: FileLayout, weights: Weights) -> list[Piece]:
    return _pieces(config, weights, family_of(config).table(layout.style))


def create(
    folder: Path, config: Config, layout: FileLayout, pieces: Sequence[Piece], sizes: Sizes, opened: Opened
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
