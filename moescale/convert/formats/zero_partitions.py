"""ZeRO's partitions: where each weight lies in the flat float32 parts that the ranks of a DeepSpeed run saved.

A group of weights is shared out over the ranks that hold the same ones: all ranks, or, of experts that lie apart, every
n-th rank where n ranks together hold all experts. Stages 1 and 2 cut a group as a whole, stage 3 each weight of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from moescale.checkpoint.archive import read_archive
from moescale.checkpoint.strided_view import Chunk, Region, Shape, Stored
from moescale.config import ConfigError
from moescale.convert.containers import inside

Apart = Callable[[str, Shape], int]
"""Among how many ranks the parts of a weight are spread that a rank holds a whole one of; 1 where all hold the same."""
Split = Callable[[Mapping[str, Shape], Sequence[Sequence[Stored]]], dict[str, Stored]]
"""Cuts a group's weights, by name, out of the parts that each rank has of it."""


Gathered = dict[tuple[str, int], Stored]


def gather(
    folder: Path, values: Mapping[str, Any], files: Mapping[int, str], apart: Apart
) -> dict[str | None, Gathered]:
    """Find each weight that the optimizer updates, and what it keeps beside each, as if all lay in one piece.

    values: of the model's file, which names the weights of each group. files: of each rank's partitions. Returns the
    weights under None, and the moments by their names: each by the weight's name and by which of the ranks that hold
    different ones has it, 0 where all hold the same. Raises ConfigError.
    """
    world = values["dp_world_size"]
    if len(files) != world or files.keys() != set(range(len(files))):
        raise ConfigError(f"{folder} is not whole: it holds ZeRO's partitions of {len(files)} ranks, and {world} saved "
                          "it: copy all of its files, and none of another checkpoint")
    states = [_State(read_archive(inside(folder, files[rank]))["optimizer_state_dict"]) for rank in range(world)]
    shapes = [{name: tuple(size) for name, size in group.items()} for group in values["param_shapes"]]
    found: dict[str | None, Gathered] = {}
    for kept in (None, *sorted(set.intersection(*(state.moments for state in states)))):
        flat = [state.parts(kept) for state in states]
        if states[0].in_groups:
            found[kept] = _gather_groups(folder, shapes, flat, states[0].split, apart)
        else:  # all weights over all ranks
            merged = {name: size for group in shapes for name, size in group.items()}
            found[kept] = {(name, 0): stored for name, stored in states[0].split(merged, flat).items()}
    return found


def _gather_groups(
    folder: Path, shapes: Sequence[Mapping[str, Shape]], flat: Sequence[Sequence[Stored]], split: Split, apart: Apart
) -> Gathered:
    """Find the weights of each group, those of experts on each of the ranks that hold other ones. flat: of each rank"""
    found: Gathered = {}
    for index, group in enumerate(shapes):
        spread = {apart(name, size) for name, size in group.items()}
        if len(spread) != 1 or len(flat) % min(spread):
            raise ConfigError(f"{folder} holds experts of some ranks and weights of all in one of ZeRO's groups, or "
                              f"spreads experts over {max(spread)} of {len(flat)} ranks, which MoEScale cannot read")
        (count,) = spread
        for position in range(count):
            weights = split(group, [parts[index : index + 1] for parts in flat[position::count]])
            found |= {(name, position): stored for name, stored in weights.items()}
    return found


class _State:
    """What one rank's file holds. split: how weights are cut. in_groups: whether groups have ranks of their own."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        stage_3 = "fp32_flat_groups" in values
        self.weights: Sequence[Stored] = values["fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"]
        self.split: Split = _split_each if stage_3 else _split_once
        self.in_groups = not stage_3 or "ds_zero_partition_groups" in values
        optimizer = values.get("optimizer_state_dict" if stage_3 else "base_optimizer_state")
        kept = optimizer.get("state") if isinstance(optimizer, Mapping) else None
        self.kept = kept if isinstance(kept, Mapping) else {}
        names = [self._moments(index) for index in range(len(self.weights))]
        self.moments = set.intersection(*names) if names else set()

    def _moments(self, index: int) -> set[str]:
        """Name what the optimizer keeps beside each weight of a group; it may be filled up at its end."""
        size = prod(self.weights[index].shape)
        return {name for name, value in self.kept.get(index, {}).items()
                if isinstance(value, Stored) and len(value.shape) == 1 and prod(value.shape) >= size}

    def parts(self, moment: str | None) -> Sequence[Stored]:
        """List the flat parts of each group. moment: None is the weights themselves"""
        if moment is None:
            return self.weights
        return [self.kept[index][moment] for index in range(len(self.weights))]


def _split_once(shapes: Mapping[str, Shape], groups: Sequence[Sequence[Stored]]) -> dict[str, Stored]:
    """Stages 1 and 2: a group's weights one after another, the whole cut into equal parts."""
    parts = [part for (part,) in groups]
    ends = list(accumulate(prod(part.shape) for part in parts))
    found, start = {}, 0
    for name, shape in shapes.items():
        stop = start + prod(shape)
        chunks = []
        for part, end in zip(parts, ends, strict=True):
            begin, first, last = end - prod(part.shape), max(start, end - prod(part.shape)), min(stop, end)
            if first < last:
                chunks.append(_chunk(part, first - begin, first - start, last - first))
        found[name] = Stored(parts[0].dtype, shape, tuple(chunks))
        start = stop
    return found


def _split_each(shapes: Mapping[str, Shape], groups: Sequence[Sequence[Stored]]) -> dict[str, Stored]:
    """Stage 3: each weight is cut into equal parts, one a rank; a rank's parts lie one after another in its groups."""
    found, start = {}, 0
    for name, shape in shapes.items():
        size = prod(shape)
        share = -(-size // len(groups))
        chunks = []
        for rank, parts in enumerate(groups):
            count = min(share, size - rank * share)
            begin = 0
            for part in parts:
                first, last = max(start, begin), min(start + count, begin + prod(part.shape))
                if first < last:
                    chunks.append(_chunk(part, first - begin, rank * share + first - start, last - first))
                begin += prod(part.shape)
        found[name] = Stored(groups[0][0].dtype, shape, tuple(chunks))
        start += share
    return found


def _chunk(part: Stored, begin: int, goal: int, count: int) -> Chunk:
    """Elements of a flat partition, from `begin` on, as those of a weight from `goal` on."""
    chunk = part.chunks[0]
    return Chunk(chunk.path, chunk.offset + begin * part.dtype.itemsize, Region(goal, (count,), (1,)))
