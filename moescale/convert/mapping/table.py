"""How a table of names and transforms is read, in both directions.

A row says which native tensor lies in which foreign one, and as which view of it. Native tensors here are those of a
checkpoint, but each matrix of an expert is one of its own, and so is what an optimizer keeps beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from moescale.checkpoint.strided_view import Region, Shape, View, region
from moescale.config import Config
from moescale.spec.weights import Weight

LAYER = "{layer}"  # in the native name of a row: any layer's number


class NativeName(NamedTuple):
    """Addresses a native tensor.

    weight: the name of the weight, `("blocks", "3", "channel_mixer", "experts", "gate")`. expert: which of the matrices
    that are stacked in it; None where none are. moment: what the optimizer keeps beside it; None for the weight itself.
    """

    weight: tuple[str, ...]
    expert: int | None = None
    moment: str | None = None

    @property
    def layer(self) -> int | None:
        """The number of the layer that has it, if one does."""
        block, *rest = self.weight
        return int(rest[0]) if block == "blocks" else None

    def __str__(self) -> str:
        moment = () if self.moment is None else ("optim", self.moment)
        return ".".join((*moment, *self.weight, *(() if self.expert is None else (str(self.expert),))))


Weights = Mapping[NativeName, Weight]
"""The native tensors of a checkpoint; an expert's description is of its own matrix, without the dim of experts."""


@dataclass(frozen=True)
class At:
    """What a transform may depend on. expert, num_experts: of those that the foreign tensor is about"""

    config: Config
    layer: int = 0
    expert: int = 0
    num_experts: int = 0
    num_layers: int = 0


@dataclass(frozen=True)
class Transform:
    """shape: of a tensor that holds one of the given shape. view: the part of it that does, and as it lies there."""

    shape: Callable[[Shape, At], Shape]
    view: Callable[..., Tensor]


def stacked_experts() -> Transform:
    """All experts of a layer in one tensor, the expert first."""
    return Transform(lambda shape, at: (at.num_experts, *shape), lambda tensor, at: tensor[at.expert])


def stacked_layers() -> Transform:
    """All layers in one tensor, the layer first."""
    return Transform(lambda shape, at: (at.num_layers, *shape), lambda tensor, at: tensor[at.layer])


def half(index: int) -> Transform:
    """Two matrices in one, the rows of the first before those of the second."""
    return Transform(lambda shape, at: (2 * shape[0], *shape[1:]), lambda tensor, at: tensor.chunk(2)[index])


def transposed() -> Transform:
    return Transform(lambda shape, at: (shape[1], shape[0]), lambda tensor, at: tensor.mT)


def grouped_columns() -> Transform:
    """[rows, experts x columns] by its shape, but in memory one matrix [rows, columns] after another."""
    return Transform(
        lambda shape, at: (shape[0], at.num_experts * shape[1]),
        lambda tensor, at: tensor.view(at.num_experts, tensor.shape[0], -1)[at.expert],
    )


def grouped_rows() -> Transform:
    """[experts x rows, columns], one matrix [rows, columns] after another."""
    return Transform(
        lambda shape, at: (at.num_experts * shape[0], shape[1]),
        lambda tensor, at: tensor.view(at.num_experts, -1, tensor.shape[1])[at.expert],
    )


def query_groups(part: str) -> Transform:
    """q, k and v in one matrix, group by group: the query heads of a key head, then that key head, then its values."""

    def shape(native: Shape, at: At) -> Shape:
        rows = native[0] // (_ratio(at) if part == "q" else 1)
        return (rows * (_ratio(at) + 2), *native[1:])

    def view(tensor: Tensor, at: At) -> Tensor:
        ratio, head_dim = _ratio(at), at.config.attention.head_dim
        groups = tensor.unflatten(0, (-1, ratio + 2, head_dim))
        return {"q": groups[:, :ratio], "k": groups[:, ratio], "v": groups[:, ratio + 1]}[part]

    return Transform(shape, view)


def _ratio(at: At) -> int:
    return at.config.attention.num_heads // at.config.attention.num_kv_heads


@dataclass(frozen=True)
class Row:
    """Says where a native tensor lies. native: the weight's name, with LAYER. foreign: with {layer} and {expert}."""

    native: tuple[str, ...]
    foreign: str
    transforms: tuple[Transform, ...] = ()


def row(native: str, foreign: str, *transforms: Transform) -> Row:
    """Write a row. native: the parts of the name joined with dots. transforms: from the native tensor outward."""
    return Row(tuple(native.split(".")), foreign, transforms)


@dataclass(frozen=True)
class Piece:
    """A part of a native tensor, and where it lies. copy: another piece holds the same part as well.

    key: of the stored tensor, `file:name`. shape: of the whole stored tensor.
    """

    native: NativeName
    part: Region
    key: str
    shape: Shape
    region: Region
    copy: bool = False


@dataclass(frozen=True)
class Cut:
    """Which part of each native tensor a file holds: rank `index` of `count`."""

    index: int = 0
    count: int = 1


WHOLE = Cut()


def piece(row: Row, native: NativeName, weight: Weight, key: str, at: At, cut: Cut = WHOLE) -> Piece:
    """Work out one row for one file, which holds a part along the dim that the weight's description names.

    native, weight: the native tensor, and its description. key: of the stored tensor. cut: this file's part.
    """
    parts: list[View] = []
    if weight.cut is not None and cut.count > 1:
        parts = [lambda tensor: tensor.chunk(cut.count, weight.cut_dim)[cut.index]]
    part = region(weight.shape, *parts)
    shape = part.shape
    for transform in row.transforms:
        shape = transform.shape(shape, at)
    views: list[View] = [partial(transform.view, at=at) for transform in reversed(row.transforms)]
    return Piece(native, part, key, shape, region(shape, *views))


def with_copies(pieces: Iterable[Piece]) -> list[Piece]:
    """Say which pieces hold what an earlier one holds too."""
    seen: set[tuple[NativeName, Region]] = set()
    marked = []
    for found in pieces:
        marked.append(replace(found, copy=(found.native, found.part) in seen))
        seen.add((found.native, found.part))
    return marked


def matches(rows: Iterable[Row], weights: Weights, config: Config) -> Iterator[tuple[Row, NativeName]]:
    """Find the native tensors that each row is about, layer by layer and expert by expert."""
    named: dict[tuple[str, ...], list[NativeName]] = defaultdict(list)
    for native in weights:
        named[native.weight].append(native)
    for entry in rows:
        for layer in range(config.model.num_layers if LAYER in entry.native else 1):
            for native in named.get(tuple(str(layer) if part == LAYER else part for part in entry.native), ()):
                yield entry, native
