"""Native tensors by name and shape, and native checkpoints as a format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moescale.checkpoint.index import read_index
from moescale.checkpoint.store import (
    MANIFEST,
    latest_checkpoint,
    read_last,
    read_stored,
    verify_checkpoint,
    write_manifest,
)
from moescale.checkpoint.strided_view import Shape, Stored, region
from moescale.config import Config, ConfigError, load_config
from moescale.convert.companions import TOKENIZER, read_companions
from moescale.convert.containers import Sizes, create_distributed, open_distributed
from moescale.convert.mapping.mapped import Layout, Opened
from moescale.convert.mapping.table import Piece
from moescale.files.locks import Lock
from moescale.optim.base import OPTIMIZERS

NAME = "moescale"
GATED = frozenset({"swiglu", "geglu"})
MOMENTS = "optim."  # begins the names of what the optimizer keeps beside weights: optim.MOMENT.WEIGHT


def native_weights(config: Config) -> dict[str, Shape]:
    """List the weights of a model, each expert's apart: `blocks.3.channel_mixer.experts.gate.11`."""
    model, moe = config.model, config.moe
    d_model, q, kv = model.d_model, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    weights: dict[str, Shape] = {"embedding.weight": (model.vocab_size, d_model)}
    for index, layer in enumerate(model.layers):
        block, mixer = f"blocks.{index}.", f"blocks.{index}.channel_mixer."
        weights[block + "mixer_norm.weight"] = (d_model,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            weights[f"{block}mixer.{name}.weight"] = (rows, d_model)
        weights[block + "mixer.o.weight"] = (d_model, q)
        if model.block == "serial":
            weights[block + "channel_norm.weight"] = (d_model,)
        if layer.channel_mixer == "feed_forward":
            for name, shape in _feed_forward(d_model, model.d_ff, model.activation).items():
                weights[f"{mixer}{name}.weight"] = shape
            continue
        weights[mixer + "router.weight"] = (moe.num_experts, d_model)
        if moe.router == "sigmoid_bias":
            weights[mixer + "router.expert_bias"] = (moe.num_experts,)
        for name, shape in _feed_forward(d_model, moe.d_ff, moe.activation).items():
            for expert in range(moe.num_experts):
                weights[f"{mixer}experts.{name}.{expert}"] = shape
        if moe.num_shared_experts:
            wide = moe.num_shared_experts * moe.d_ff
            for name, shape in _feed_forward(d_model, wide, moe.activation).items():
                weights[f"{mixer}shared.{name}.weight"] = shape
    weights["norm.weight"] = (d_model,)
    if not model.tied_embeddings:
        weights["head.weight"] = (model.vocab_size, d_model)
    return weights


def _feed_forward(d_model: int, d_ff: int, activation: str) -> dict[str, Shape]:
    names = ("gate", "up") if activation in GATED else ("up",)
    return {**dict.fromkeys(names, (d_ff, d_model)), "down": (d_model, d_ff)}


def with_moments(weights: Mapping[str, Shape], config: Config) -> dict[str, Shape]:
    """Add what the run's optimizer keeps beside each weight that learns."""
    moments = OPTIMIZERS[config.optim.name].moments
    learns = {name: shape for name, shape in weights.items() if not name.endswith("expert_bias")}
    return {**weights, **{f"{MOMENTS}{moment}.{name}": shape for name, whole in learns.items()
                          for moment, shape in moments(whole).items()}}


def is_moment(name: str) -> bool:
    """Say whether this is what an optimizer keeps beside a weight, and not a weight."""
    return name.startswith(MOMENTS)


def weight_of(name: str) -> str:
    """Name the weight that a moment lies beside; a weight is its own."""
    return name.split(".", 2)[2] if is_moment(name) else name


def native_pieces(weights: Mapping[str, Shape], num_experts: int) -> list[Piece]:
    """Say where each lies in a native checkpoint: experts in one tensor, the expert first."""
    pieces = []
    for name, shape in weights.items():
        key, whole, views = (name if is_moment(name) else f"model.{name}"), shape, []
        head, _, expert = key.rpartition(".")
        if expert.isdigit():
            key, whole = head, (num_experts, *shape)
            views = [lambda tensor, expert=int(expert): tensor[expert]]
        pieces.append(Piece(name, region(shape), key, whole, region(whole, *views)))
    return pieces


def detect(path: Path) -> bool:
    return (path / MANIFEST).exists() or latest_checkpoint(path) is not None


def open_checkpoint(path: Path) -> Opened:
    """Open a checkpoint, or the last one of a run directory. Raises ConfigError."""
    return read_last(path, _open)


def _open(folder: Path) -> Opened:
    hold, manifest = Lock(folder, shared=True), verify_checkpoint(folder)
    config = load_config(folder / "config.yaml", whole=True)
    tensors = open_distributed(folder)
    weights = native_weights(config)
    if any(map(is_moment, tensors)):
        weights = with_moments(weights, config)
    files = read_companions(folder)
    return Opened(NAME, folder, config, Layout(), weights, tensors, native_pieces(weights, config.moe.num_experts),
                  files=files, state=manifest["state"], hold=hold)


def check_model(folder: Path, config: Config) -> None:
    """Refuse a checkpoint that does not hold the weights of this model, before there is room for them in memory."""
    stored = read_stored(folder)
    weights = native_weights(config)
    shapes = {piece.key: piece.shape for piece in native_pieces(weights, config.moe.num_experts)}
    for key, shape in shapes.items():
        found = stored.get(key)
        if found is None or tuple(found.size) != shape:
            there = "is not in it" if found is None else f"has shape {list(found.size)} there and {list(shape)} here"
            raise ConfigError(f"{folder} is a checkpoint of another model than its configuration says: {key} {there}")


def refuse(config: Config, layout: Layout, dtype: torch.dtype | None) -> None:
    """Refuse what cannot be written."""
    if dtype not in (None, torch.float32):
        raise ConfigError("a native checkpoint holds float32 weights: write --dtype float32, or leave it out")
    if layout != Layout():
        raise ConfigError("a native checkpoint is not cut by a layout, and loads in every one: leave out "
                          "--ep, --tp, --pp, --etp and --style")


def plan(config: Config, layout: Layout, weights: Mapping[str, Shape]) -> list[Piece]:
    return native_pieces(weights, config.moe.num_experts)


def settled(config: Config, destination: Path, files: Mapping[str, bytes]) -> Config:
    """Name the run that is written, and the tokenizer that lies beside its configuration."""
    tokenizer = TOKENIZER if TOKENIZER in files else config.data.tokenizer
    run, data = config.run.model_copy(update={"dir": str(destination)}), config.data
    return config.model_copy(update={"run": run, "data": data.model_copy(update={"tokenizer": tokenizer})})


def _state(names: Iterable[str], source: Mapping[str, Any]) -> dict[str, Any]:
    """Say from where a run goes on. Without the optimizer's state it starts anew, with these weights."""
    if any(map(is_moment, names)):
        return {"step": 0, "seed": 0, **source}
    return {"step": 0, "seed": source.get("seed", 0), "converted": True}


def create(
    folder: Path, config: Config, layout: Layout, pieces: Sequence[Piece], sizes: Sizes, opened: Opened
) -> dict[str, Stored]:
    """Lay out a run directory with one checkpoint, a file a block."""
    inner = folder / "checkpoints" / f"step_{_state(sizes, opened.state)['step']:08d}"
    inner.mkdir(parents=True)
    files: dict[str, dict[str, Any]] = {}
    for key, size in sizes.items():
        block = key.partition("blocks.")[2].partition(".")[0]
        files.setdefault(f"__{int(block) + 1 if block else 0}_0.distcp", {})[key] = size
    for name, content in {"config.yaml": config.to_yaml().encode(), **opened.files}.items():
        (inner / name).write_bytes(content)
        (folder / name).write_bytes(content)
    leading = {key: int(key.rpartition(".")[0].endswith(".experts")) for key in sizes}
    return create_distributed(inner, files, leading)


def finish(folder: Path, opened: Opened) -> None:
    """Write the manifest, with the size and checksum of every file."""
    (inner,) = (folder / "checkpoints").iterdir()
    names = read_index(inner, {path.name for path in inner.iterdir()})
    write_manifest(inner, _state(names, opened.state))
