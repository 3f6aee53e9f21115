"""Native tensors by name and shape, and native checkpoints as a format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moescale.checkpoint.index import read_metadata, tensors_of
from moescale.checkpoint.store import (
    MANIFEST,
    latest_checkpoint,
    read_last,
    read_stored,
    verify_checkpoint,
    write_manifest,
)
from moescale.checkpoint.strided_view import Stored, region
from moescale.config import Config, ConfigError, load_config
from moescale.convert.companions import TOKENIZER, read_companions
from moescale.convert.containers import Sizes, create_distributed, open_distributed
from moescale.convert.mapping.mapped import FileLayout, Opened
from moescale.convert.mapping.table import NativeName, Piece, Weights
from moescale.files.locks import FileLock
from moescale.optim.base import OPTIMIZERS
from moescale.spec.model import describe
from moescale.spec.weights import Weight

NAME = "moescale"
MOMENTS = "optim."  # begins the keys of what the optimizer keeps beside weights, optim.MOMENT.WEIGHT


def native_weights(config: Config) -> dict[NativeName, Weight]:
    """List the weights of a model, each expert's apart."""
    weights: dict[NativeName, Weight] = {}
    for weight in describe(config).weights():
        if weight.view == "sparse":  # the experts of a layer, stacked
            one = replace(weight, shape=weight.shape[1:], dims=weight.dims[1:])
            weights |= {NativeName(weight.name, expert): one for expert in range(weight.shape[0])}
        else:
            weights[NativeName(weight.name)] = weight
    return weights


def with_moments(weights: Weights, config: Config) -> dict[NativeName, Weight]:
    """Add what the run's optimizer keeps beside each weight that learns."""
    moments = OPTIMIZERS[config.optim.name].moments
    return {**weights, **{native._replace(moment=moment.name[0]): moment
                          for native, weight in weights.items() if weight.learns
                          for moment in moments(weight, config.optim)}}


def native_pieces(weights: Weights) -> list[Piece]:
    """Say where each lies in a native checkpoint: experts in one tensor, the expert first."""
    experts = Counter((native.weight, native.moment) for native in weights)
    pieces = []
    for native, weight in weights.items():
        key = ("model." if native.moment is None else f"{MOMENTS}{native.moment}.") + ".".join(native.weight)
        whole, views = weight.shape, []
        if native.expert is not None:
            whole = (experts[native.weight, native.moment], *weight.shape)
            views = [lambda tensor, expert=native.expert: tensor[expert]]
        pieces.append(Piece(native, region(weight.shape), key, whole, region(whole, *views)))
    return pieces


def detect(path: Path) -> bool:
    return (path / MANIFEST).exists() or latest_checkpoint(path) is not None


def open_checkpoint(path: Path) -> Opened:
    """Open a checkpoint, or the last one of a run directory. Raises ConfigError."""
    return read_last(path, _open)


def _open(folder: Path) -> Opened:
    hold, manifest = FileLock(folder, shared=True), verify_checkpoint(folder)
    config = load_config(folder / "config.yaml", whole=True)
    tensors = open_distributed(folder)
    weights = native_weights(config)
    if any(key.startswith(MOMENTS) for key in tensors):
        weights = with_moments(weights, config)
    files = read_companions(folder)
    return Opened(NAME, folder, config, FileLayout(), weights, tensors, native_pieces(weights), files=files,
                  state=manifest["state"], hold=hold)


def check_model(folder: Path, config: Config) -> None:
    """Refuse a checkpoint that does not hold the weights of this model, before there is room for them in memory."""
    stored = read_stored(folder)
    shapes = {piece.key: piece.shape for piece in native_pieces(native_weights(config))}
    for key, shape in shapes.items():
        found = stored.get(key)
        if found is None or tuple(found.size) != shape:
            there = "is not in it" if found is None else f"has shape {list(found.size)} there and {list(shape)} here"
            raise ConfigError(f"{folder} is a checkpoint of another model than its configuration says: {key} {there}")


def refuse(config: Config, layout: FileLayout, dtype: torch.dtype | None) -> None:
    """Refuse what cannot be written."""
    if dtype not in (None, torch.float32):
        raise ConfigError("a native checkpoint holds float32 weights: write --dtype float32, or leave it out")
    if layout != FileLayout():
        raise ConfigError("a native checkpoint is not cut by a layout, and loads in every one: leave out "
                          "--ep, --tp, --pp, --etp and --style")


def plan(config: Config, layout: FileLayout, weights: Weights) -> list[Piece]:
    return native_pieces(weights)


def settled(config: Config, destination: Path, files: Mapping[str, bytes]) -> Config:
    """Name the run that is written, and the tokenizer that lies beside its configuration."""
    tokenizer = TOKENIZER if TOKENIZER in files else config.data.tokenizer
    run, data = config.run.model_copy(update={"dir": str(destination)}), config.data
    return config.model_copy(update={"run": run, "data": data.model_copy(update={"tokenizer": tokenizer})})


def _state(keys: Iterable[str], source: Mapping[str, Any]) -> dict[str, Any]:
    """Say from where a run goes on. Without the optimizer's state it starts anew, with these weights."""
    if any(key.startswith(MOMENTS) for key in keys):
        return {"step": 0, "seed": 0, **source}
    return {"step": 0, "seed": source.get("seed", 0), "converted": True}


def create(
    folder: Path, config: Config, layout: FileLayout, pieces: Sequence[Piece], sizes: Sizes, opened: Opened
) -> dict[str, Stored]:
    """Lay out a run directory with one checkpoint, a file a block."""
    inner = folder / "checkpoints" / f"step_{_state(sizes, opened.state)['step']:08d}"
    inner.mkdir(parents=True)
    files: dict[str, dict[str, Any]] = {}
    for piece in pieces:
        layer = piece.native.layer
        files.setdefault(f"__{0 if layer is None else layer + 1}_0.distcp", {})[piece.key] = sizes[piece.key]
    for name, content in {"config.yaml": config.to_yaml().encode(), **opened.files}.items():
        (inner / name).write_bytes(content)
        (folder / name).write_bytes(content)
    return create_distributed(inner, files, {piece.key: int(piece.native.expert is not None) for piece in pieces})


def finish(folder: Path, opened: Opened) -> None:
    """Write the manifest, with the size and checksum of every file."""
    (inner,) = (folder / "checkpoints").iterdir()
    names = tensors_of(read_metadata(inner), inner, {path.name for path in inner.iterdir()})
    write_manifest(inner, _state(names, opened.state))
