"""From one format to another, tensor by tensor, through native names.

A source is opened by its headers, and every element of it is accounted for; the destination is laid out at its full
size beside its place; native tensors then go across one by one, several at a time, and the folder is renamed. Whatever
goes wrong on the way, the destination does not appear.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from moescale.checkpoint.strided_view import Chunk, Stored
from moescale.config import Config, ConfigError
from moescale.convert.companions import with_companions, write_companions
from moescale.convert.containers import Sizes
from moescale.convert.copying import Copier, Recipe
from moescale.convert.fingerprint import fingerprints
from moescale.convert.formats import deepspeed, native
from moescale.convert.formats.hf import weights as hf
from moescale.convert.formats.hf.folder import why_no_model
from moescale.convert.formats.megatron import files as megatron_files
from moescale.convert.journal import Journal
from moescale.convert.mapping.mapped import FileLayout, Opened, by_weight, check_pieces
from moescale.convert.mapping.table import NativeName, Piece, Weights
from moescale.files.reading import explain
from moescale.spec.model import KINDS


class Format(Protocol):
    """What a module of a format has."""

    NAME: str

    def detect(self, path: Path) -> bool: ...
    def open_checkpoint(self, path: Path) -> Opened: ...
    def refuse(self, config: Config, layout: FileLayout, dtype: torch.dtype | None) -> None: ...
    def plan(self, config: Config, layout: FileLayout, weights: Weights) -> list[Piece]: ...
    def create(
        self, folder: Path, config: Config, layout: FileLayout, pieces: list[Piece], sizes: Sizes, opened: Opened
    ) -> dict[str, Stored]: ...
    def finish(self, folder: Path, opened: Opened) -> None: ...


JOURNAL = 2  # of what it says of a tensor; one that says it otherwise begins anew
FORMATS: dict[str, Format] = {module.NAME: module for module in (native, hf, megatron_files, deepspeed)}


@dataclass(frozen=True)
class Change:
    """Another model than the source's: its configuration, and a recipe for each of its native tensors.

    name: tells it from other changes. keeps_logits: whether it computes what the source does. files: texts to put
    beside it.
    """

    config: Config
    recipes: Mapping[NativeName, Recipe]
    name: str
    keeps_logits: bool
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """source: as it was read. fingerprints: of what was written. left_out: source tensors that were not used, why."""

    source: Opened
    fingerprints: Mapping[str, str]
    left_out: Mapping[str, str]
    size_bytes: int


Check = Callable[[Opened, Opened, Mapping[str, str]], None]
"""Looks at the source and at what was written, by its fingerprints, before it appears. Raises ConfigError."""


def open_source(path: Path) -> Opened:
    """Open a checkpoint of any known format. Raises ConfigError."""
    if not path.is_dir():
        hint = (": download the model first and give its folder" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
                else "")
        raise ConfigError(f"no such checkpoint: {path}{hint}")
    for module in FORMATS.values():
        opened = _open(module, path)
        if opened is not None:
            return opened
    raise ConfigError(why_no_model(path) or f"{path} is no checkpoint of a known format: " + ", ".join(FORMATS))


def _open(module: Format, path: Path) -> Opened | None:
    """Open a checkpoint of one format; None where it is of another. Raises ConfigError."""
    try:
        if not module.detect(path):
            return None
        opened = module.open_checkpoint(path)
        return opened if opened.format == native.NAME else with_companions(opened, path)
    except ConfigError:
        raise
    except Exception as error:  # what other programs or enemies wrote can be odd in any way
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}, "
        raise ConfigError(f"{path} cannot be read as a checkpoint of {module.NAME}: {kind}{explain(error)}") from None


def differences(config: Config, to: str) -> Iterator[str]:
    """Name what no foreign format can say: layers of one kind with keys of their own, patterns other than windows."""
    for key in ("dilation", "block_size", "stride", "global_tokens", "memory"):
        value = getattr(config.attention, key)
        if value != type(config.attention).model_fields[key].default:
            yield f"attention.{key}={value}"
    for number, entry in enumerate(config.model.pattern):
        if to != hf.NAME and (entry.mixer != "attention" or entry.channel_mixer == "none"):
            yield f"model.pattern.{number} with mixer={entry.mixer} and channel_mixer={entry.channel_mixer}"
        for kind in KINDS:
            for key, value in getattr(entry, kind).items():
                if value != getattr(getattr(config, kind), key):
                    yield (f"model.pattern.{number}.{kind}.{key}={value}, other than {kind}.{key}="
                           f"{getattr(getattr(config, kind), key)}")


def convert(
    source: Opened, destination: Path, to: str, layout: FileLayout, dtype: torch.dtype | None = None, *,
    change: Change | None = None, check: Check | None = None,
) -> Result:
    """Write a checkpoint in another format, whole or not at all; the same call again goes on where it was cut off.

    dtype: of the weights; None keeps the source's, where the format can hold it. change: to another model.
    Raises ConfigError.
    """
    target = FORMATS[to]
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"{destination} exists already: give a folder that does not")

    # the model that is written, and how each of its native tensors comes about
    unchanged = {name: Recipe((name,)) for name in source.weights}
    config, recipes = (source.config, unchanged) if change is None else (change.config, change.recipes)
    if to != native.NAME:  # no other format takes the optimizer's state
        recipes = {name: recipe for name, recipe in recipes.items() if name.moment is None}
        for named in differences(config, to):
            raise ConfigError(f"{named}, which --to {to} cannot say: convert --to moescale")
    target.refuse(config, layout, dtype)
    config = native.settled(config, destination, source.files)
    weights = native.native_weights(config)
    if any(name.moment is not None for name in recipes):
        weights = native.with_moments(weights, config)
    if recipes.keys() != weights.keys():
        raise AssertionError("a recipe for each native tensor, and none else")

    # where each of them goes and as which dtype, held to the whole before anything is read or written
    pieces = target.plan(config, layout, weights)
    shapes = {piece.key: piece.shape for piece in pieces}
    check_pieces(weights, shapes, pieces, f"{to} checkpoint of this model")
    written = _dtypes(source, recipes, weights, dtype, to, config)
    sizes = {piece.key: (piece.shape, written[piece.native]) for piece in pieces}
    _check_room(destination, sizes)

    journal = Journal(destination, _plan(source, config, to, layout, sizes, change))
    with _kept_or_discarded(journal, source, destination):
        # files of full size beside the destination, all but the numbers
        fresh = journal.fresh()
        places = target.create(fresh, config, layout, pieces, sizes, source)
        if to != native.NAME:
            write_companions(fresh, source.files, config, source.state.get("step", 0))
        for name, text in ({} if change is None else change.files).items():
            (fresh / name).write_text(text, encoding="utf-8")
        places = {key: _moved(stored, fresh, journal.data) for key, stored in places.items()}
        journal.adopt(fresh)

        # the numbers, unless an earlier call copied them
        Copier(source, recipes, weights, by_weight(source.pieces), by_weight(pieces), places).copy_all(journal)
        target.finish(journal.data, source)

        # a last look, and the whole appears in one step
        found = fingerprints(weights, {name: journal.done[str(name)] for name in weights if name.moment is None})
        if check is not None:
            check(source, target.open_checkpoint(journal.data), found)
        journal.publish()
    used = {name for recipe in recipes.values() for name in recipe.sources}
    unused = {str(name): "not part of the destination" for name in source.weights if name not in used}
    return Result(source, found, {**source.left_out, **unused}, sum(stored.size_bytes for stored in places.values()))


@contextmanager
def _kept_or_discarded(journal: Journal, source: Opened, destination: Path) -> Iterator[None]:
    """Discard what was written where the same call would fail again; else keep it, to go on from."""
    try:
        yield
    except ConfigError:
        journal.discard()
        raise
    except OSError as error:
        if not source.path.exists():
            raise ConfigError(f"{source.path} was removed while it was read") from None
        raise ConfigError(f"{destination} could not be written: {(error.strerror or str(error)).lower()}; the same "
                          "command goes on from here") from None
    finally:
        journal.close()


def _dtypes(
    source: Opened, recipes: Mapping[NativeName, Recipe], weights: Weights, dtype: torch.dtype | None, to: str,
    config: Config,
) -> dict[NativeName, torch.dtype]:
    """Choose what each native tensor is written as."""
    exact = torch.float64 if config.precision.compute == "float64" else torch.float32
    moments = torch.bfloat16 if config.optim.moments == "bfloat16" else exact
    stored = {piece.native: source.tensors[piece.key].dtype for piece in source.pieces}
    chosen = {}
    for name, recipe in recipes.items():
        kept = [stored[part] for part in recipe.sources]
        if to == native.NAME and name.moment is not None:
            chosen[name] = moments
            continue
        chosen[name] = exact if to == native.NAME or not weights[name].learns or not kept else dtype or kept[0]
    return chosen


def _check_room(destination: Path, sizes: Sizes) -> None:
    need = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in sizes.values())
    parent = destination.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(destination.name + ".partial")
    there = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(parent).free + there
    if need > free:
        raise ConfigError(f"{destination} needs {need:,} bytes, but {parent} has {free:,} left")


def _plan(
    source: Opened, config: Config, to: str, layout: FileLayout, sizes: Sizes, change: Change | None
) -> str:
    """Say in a few letters what is converted to what: only the same conversion goes on where one was cut off."""
    files = sorted({chunk.path for stored in source.tensors.values() for chunk in stored.chunks})
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    what = [JOURNAL, stats, config.model_dump(mode="json"), to, vars(layout),
            [(key, str(size)) for key, size in sizes.items()],
            None if change is None else [change.name, *map(str, change.files.values())]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _moved(stored: Stored, old: Path, new: Path) -> Stored:
    chunks = tuple(Chunk(new / chunk.path.relative_to(old), chunk.offset, chunk.part) for chunk in stored.chunks)
    return replace(stored, chunks=chunks)
