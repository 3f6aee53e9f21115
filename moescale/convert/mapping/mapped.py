"""A checkpoint seen through its format's table: which native tensors it holds, and where each part of them lies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moescale.checkpoint.strided_view import Region, Shape, Stored, covers_once, read_region, region
from moescale.config import Config, ConfigError
from moescale.convert.mapping.table import NativeName, Piece, Weights


@dataclass(frozen=True)
class FileLayout:
    """Over how many ranks a format's files are cut, and which of its styles they have; None is its usual one."""

    ep: int = 1
    tp: int = 1
    pp: int = 1
    etp: int = 1
    style: str | None = None


@dataclass(frozen=True)
class Opened:
    """A checkpoint that lies on the disk, every tensor of which is accounted for.

    weights: the native tensors, the optimizer's moments among them, each expert's apart. tensors, by key.
    left_out: tensors that are not read, and why.
    files: to take along, by name. state: small values that a run goes on from. notes: what the user should hear.
    hold: keeps it from being removed.
    """

    format: str
    path: Path
    config: Config
    layout: FileLayout
    weights: Weights
    tensors: Mapping[str, Stored]
    pieces: Sequence[Piece]
    left_out: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    hold: object = None

    def __post_init__(self) -> None:
        check_pieces(self.weights, {key: stored.shape for key, stored in self.tensors.items()}, self.pieces,
                     str(self.path), self.left_out)


def by_weight(pieces: Iterable[Piece]) -> dict[NativeName, list[Piece]]:
    """List the pieces of each native tensor."""
    found = defaultdict(list)
    for piece in pieces:
        found[piece.native].append(piece)
    return found


def check_pieces(
    weights: Weights, shapes: Mapping[str, Shape], pieces: Iterable[Piece], name: str,
    left_out: Iterable[str] = (),
) -> None:
    """Refuse a mapping that does not use every element of every tensor once, on both of its sides.

    weights: native tensors. shapes: of the stored ones, by key. name: of the checkpoint, for errors.
    """
    ours: dict[NativeName, list[Region]] = {native: [] for native in weights}
    theirs: dict[str, list[Region]] = {key: [] for key in shapes if key not in set(left_out)}
    for piece in pieces:
        if piece.key not in shapes:
            raise ConfigError(f"{name} is not whole: {_named(piece.key)} is missing")
        if tuple(shapes[piece.key]) != tuple(piece.shape):
            raise ConfigError(f"{name}: {_named(piece.key)} has shape {list(shapes[piece.key])}, but its configuration "
                              f"makes it {list(piece.shape)}")
        theirs[piece.key].append(piece.region)
        if not piece.copy:
            ours[piece.native].append(piece.part)
    for native, parts in ours.items():
        problem = covers_once(weights[native].shape, parts)
        if problem:
            raise ConfigError(f"{name} does not hold the whole of {native} once: it {problem}")
    for key, parts in theirs.items():
        problem = covers_once(shapes[key], parts)
        if problem:
            raise ConfigError(f"{name}: {_named(key)} {problem}; no model that MoEScale can express has it")


def read_weight(opened: Opened, pieces: Sequence[Piece], name: NativeName) -> Tensor:
    """Put a native tensor together from its parts. Raises ConfigError where two copies of a part differ."""
    whole = region(opened.weights[name].shape)
    first = pieces[0]
    if first.part == whole:
        values = read_region(opened.tensors[first.key], first.region).reshape(whole.shape).contiguous()
        rest = pieces[1:]
    else:
        values, rest = torch.empty(whole.shape, dtype=opened.tensors[first.key].dtype), pieces
    for piece in sorted(rest, key=lambda piece: piece.copy):
        part = read_region(opened.tensors[piece.key], piece.region)
        goal = values.as_strided(piece.part.shape, piece.part.stride, piece.part.offset)
        if not piece.copy:
            goal.copy_(part.reshape(goal.shape))
        elif not torch.equal(goal, part.reshape(goal.shape)):
            raise ConfigError(f"{opened.path}: {_named(piece.key)} is no copy of {name}, which the model has but once")
    return values


def weights_of(opened: Opened, *, moments: bool = False) -> Iterator[tuple[NativeName, Tensor]]:
    """Read the weights of the model, one after another. moments: the optimizer's too"""
    for name, pieces in by_weight(opened.pieces).items():
        if moments or name.moment is None:
            yield name, read_weight(opened, pieces, name)


def _named(key: str) -> str:
    """Say what a key means: a file may stand before the tensor's name."""
    file, _, tensor = key.rpartition(":")
    return f"{tensor} in {file}" if file else tensor
