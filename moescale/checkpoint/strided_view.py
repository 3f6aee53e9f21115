"""Tensors as they lie in files, and views of them: read, written and accounted for without loading the whole.

Every transform of a conversion, be it a cut, a stack, an interleaving or a transposition, is a strided view of the
stored tensor; it is worked out on a tensor without data, and then read or written as runs of bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]
View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Region:
    """A view of a tensor that lies in order. offset, stride: in elements"""

    offset: int
    shape: Shape
    stride: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def order(self) -> list[int]:
        """Order the dims, the one with the longest step first."""
        return sorted(range(len(self.shape)), key=lambda dim: -self.stride[dim])

    def rows(self, begin: int, end: int) -> Region:
        """Take some of its first dim."""
        return Region(self.offset + begin * self.stride[0], (end - begin, *self.shape[1:]), self.stride)

    def runs(self) -> tuple[np.ndarray, int]:
        """Break it into pieces without gaps: where each begins, in elements and in `order`, and the length of all."""
        length, outer = 1, list[int]()
        for dim in reversed(self.order()):
            if self.stride[dim] == length and not outer:
                length *= self.shape[dim]
            elif self.shape[dim] != 1:
                outer.append(dim)
        starts = np.array([self.offset], dtype=np.int64)
        for dim in reversed(outer):
            starts = (starts[:, None] + np.arange(self.shape[dim]) * self.stride[dim]).reshape(-1)
        return starts, length


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, its elements in order, in a file. offset: bytes into the file. part: of the whole tensor"""

    path: Path
    offset: int
    part: Region


@dataclass(frozen=True)
class Stored:
    """A tensor in files."""

    dtype: torch.dtype
    shape: Shape
    chunks: tuple[Chunk, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def region(shape: Shape, *views: View) -> Region:
    """Say where a view of a tensor of this shape lies; the views are applied one after another."""
    tensor = torch.empty(shape, device="meta")
    for view in views:
        tensor = view(tensor)
    return Region(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


def box(shape: Shape, offsets: Sequence[int], sizes: Sequence[int]) -> Region:
    """Say where a box in a tensor of this shape lies, which begins at `offsets` and has these sizes."""
    slices = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
    return region(shape, itemgetter(slices))


def stored_whole(path: Path, offset: int, dtype: torch.dtype, shape: Shape) -> Stored:
    """Describe a tensor that lies in one piece."""
    return Stored(dtype, tuple(shape), (Chunk(path, offset, region(shape)),))


def read_region(stored: Stored, part: Region) -> Tensor:
    """Read a view as a tensor of its shape. Transposed views come as views of what was read."""
    order = part.order()
    buffer = torch.empty([part.shape[dim] for dim in order], dtype=stored.dtype)
    for path, moves in _transfers(stored, part):
        with path.open("rb", buffering=0) as file:
            data = _bytes(buffer)
            for offset, begin, size in moves:
                _read_exactly(file.fileno(), data[begin : begin + size], offset, path)
    return buffer.permute([order.index(dim) for dim in range(len(order))])


def write_region(stored: Stored, part: Region, values: Tensor) -> None:
    """Write values, shaped as the view or with its number of elements, into files that have room for them."""
    data = _bytes(values.reshape(part.shape).permute(part.order()).contiguous())
    for path, moves in _transfers(stored, part):
        with path.open("r+b", buffering=0) as file:
            for offset, begin, size in moves:
                _write_exactly(file.fileno(), data[begin : begin + size], offset)


def _read_exactly(descriptor: int, goal: memoryview, offset: int, path: Path) -> None:
    """Fill all of `goal`; the system may take several reads for it. Raises OSError where the file is too short."""
    while len(goal):
        count = os.preadv(descriptor, [goal], offset)
        if count == 0:
            raise OSError(0, "the file ends in the middle of a tensor", str(path))
        offset, goal = offset + count, goal[count:]


def _write_exactly(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data`; the system may take several writes for it."""
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        offset, data = offset + count, data[count:]


def _transfers(stored: Stored, part: Region) -> Iterator[tuple[Path, list[tuple[int, int, int]]]]:
    """List for each file: place in it, place in the view's own order, size, all in bytes."""
    itemsize = stored.dtype.itemsize
    # the view's runs, sorted by where they lie in the stored tensor
    starts, length = part.runs()
    order = np.argsort(starts, kind="stable")
    first, last = starts[order], starts[order] + length
    for chunk in stored.chunks:
        # of each of the chunk's runs: the range of the view's runs that overlap it
        there, run = chunk.part.runs()
        low, high = np.searchsorted(last, there, "right"), np.searchsorted(first, there + run, "left")
        count = np.maximum(high - low, 0)
        # of each overlap, [overlaps]: which run of the chunk, which of the view, from which element to which
        theirs = np.repeat(np.arange(len(there)), count)
        ours = np.arange(len(theirs)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
        begin = np.maximum(first[ours], there[theirs])
        end = np.minimum(last[ours], there[theirs] + run)
        # in bytes: where it lies in the file, and where in the view
        offset = chunk.offset + (theirs * run + begin - there[theirs]) * itemsize
        goal = (order[ours] * length + begin - first[ours]) * itemsize
        if len(begin):
            sizes = (end - begin) * itemsize
            yield chunk.path, list(zip(offset.tolist(), goal.tolist(), sizes.tolist(), strict=True))


def covers_once(shape: Shape, parts: Iterable[Region]) -> str | None:
    """Check that the views hold each element of a tensor exactly once: None, or else what is wrong."""
    starts, ends = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for part in parts:
        first, length = part.runs()
        starts.append(first)
        ends.append(first + length)
    begin, end = np.concatenate(starts), np.concatenate(ends)
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], end[order]
    if (begin[1:] < end[:-1]).any():
        return "is used twice"
    covered = int((end - begin).sum())
    if covered != math.prod(shape):
        return f"is used only in part ({covered} of {math.prod(shape)} elements)" if covered else "is not used"
    return None


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
