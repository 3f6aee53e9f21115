"""Native tensors on their way from one checkpoint into the files of another, several at a time."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from moescale.checkpoint.strided_view import Stored, read_region, write_region
from moescale.config import ConfigError
from moescale.convert.fingerprint import Digest, digests, has_rows
from moescale.convert.journal import Journal
from moescale.convert.mapping.mapped import Opened, read_weight
from moescale.convert.mapping.table import NativeName, Piece, Weights

THREADS = 4
BLOCK = 1 << 20  # elements looked at at a time
ROWS_BYTES = 1 << 22  # of a matrix that goes across row by row, at a time


@dataclass(frozen=True)
class Recipe:
    """How a native tensor of the destination comes from those of the source, one by one in their order."""

    sources: tuple[NativeName, ...]
    combine: Callable[[Iterator[Tensor]], Tensor] = next


@dataclass(frozen=True)
class Copier:
    """Copies native tensors by name.

    recipes: how each comes about. weights: their descriptions. origins: where the source's lie. goals: where each is
    to lie, in the tensors that `places` finds by key.
    """

    source: Opened
    recipes: Mapping[NativeName, Recipe]
    weights: Weights
    origins: Mapping[NativeName, Sequence[Piece]]
    goals: Mapping[NativeName, Sequence[Piece]]
    places: Mapping[str, Stored]

    def copy_all(self, journal: Journal) -> None:
        """Copy what is not done yet, within twice the memory of the largest matrix."""
        todo = [name for name in self.recipes if str(name) not in journal.done]
        sizes, needs = {name: self._size_bytes(name) for name in todo}, {name: self._need_bytes(name) for name in todo}
        budget = _Budget(max(needs.values(), default=0))
        stop = threading.Event()

        def copy(name: NativeName) -> None:
            with budget.of(needs[name]):
                if not stop.is_set():
                    journal.finished(str(name), self._copy(name), sizes[name])

        with _progress(sum(sizes.values())) as advance, ThreadPoolExecutor(THREADS) as pool:
            futures = {name: pool.submit(copy, name) for name in todo}
            try:
                for name, future in futures.items():
                    future.result()
                    advance(sizes[name])
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                journal.commit()
                raise
        journal.commit()

    def _size_bytes(self, name: NativeName) -> int:
        """Count the bytes that are written of a tensor."""
        return sum(goal.part.size * self.places[goal.key].dtype.itemsize for goal in self.goals[name])

    def _need_bytes(self, name: NativeName) -> int:
        """Count the bytes of memory that a tensor takes at most: as it was read, and as it is written."""
        read = written = 0
        for part in self.recipes[name].sources:
            pieces = self.origins[part]
            item_bytes = self.source.tensors[pieces[0].key].dtype.itemsize
            read = max(read, pieces[0].part.size * len(pieces) * item_bytes)
        for goal in self.goals[name]:
            written = max(written, goal.part.size * self.places[goal.key].dtype.itemsize)
        return read + written + ROWS_BYTES

    def _copy(self, name: NativeName) -> list[str]:
        """Copy one tensor, and return its digests."""
        recipe, goals = self.recipes[name], self.goals[name]
        if self._streams(name):
            return [self._copy_rows(name)]
        values = recipe.combine(read_weight(self.source, self.origins[part], part) for part in recipe.sources)
        _refuse_nan(values, name, self.source.path)
        values = values.to(self.places[goals[0].key].dtype).contiguous()
        for goal in goals:
            begin = values.storage_offset() + goal.part.offset
            part = values.as_strided(goal.part.shape, goal.part.stride, begin)
            write_region(self.places[goal.key], goal.region, part)
        return digests(self.weights[name], values)

    def _streams(self, name: NativeName) -> bool:
        """Say whether a tensor can go across a few rows at a time: it is as it was, and lies in rows on both sides."""
        recipe = self.recipes[name]
        if recipe.combine is not next or has_rows(self.weights[name]):
            return False
        theirs = self.origins[recipe.sources[0]]
        whole = theirs[0].part
        return len(theirs) == 1 and all(
            piece.part == whole and piece.region.shape == whole.shape and piece.region.order() == whole.order()
            for piece in (*theirs, *self.goals[name]))

    def _copy_rows(self, name: NativeName) -> str:
        """Copy a matrix a few rows at a time, which stay in the processor's caches on their way."""
        (theirs,), goals = self.origins[self.recipes[name].sources[0]], self.goals[name]
        stored, dtype, shape = self.source.tensors[theirs.key], self.places[goals[0].key].dtype, theirs.region.shape
        step = max(1, ROWS_BYTES // (math.prod(shape[1:]) * max(stored.dtype.itemsize, dtype.itemsize)))
        digest = Digest(shape)
        for begin in range(0, shape[0], step):
            end = min(begin + step, shape[0])
            values = read_region(stored, theirs.region.rows(begin, end))
            _refuse_nan(values, name, self.source.path)
            values = values.to(dtype)
            digest.update(values)
            for goal in goals:
                write_region(self.places[goal.key], goal.region.rows(begin, end), values)
        return digest.hex()


def _refuse_nan(values: Tensor, name: NativeName, path: Path) -> None:
    flat = values.reshape(-1)
    for begin in range(0, len(flat), BLOCK):
        block = flat[begin : begin + BLOCK]
        # the sum is no number where one of them is none; it may also be too large, so then all are looked at
        if not bool(block.sum(dtype=torch.float32).isfinite()) and not bool(block.isfinite().all()):
            raise ConfigError(f"{path}: {name} holds values that are no finite numbers")


class _Budget:
    """Lets work begin while memory is left for it; a piece of work larger than all of it runs alone."""

    def __init__(self, size_bytes: int) -> None:
        self.total = self.left = size_bytes
        self.changed = threading.Condition()

    @contextmanager
    def of(self, size_bytes: int) -> Iterator[None]:
        size_bytes = min(size_bytes, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.left >= size_bytes)
            self.left -= size_bytes
        try:
            yield
        finally:
            with self.changed:
                self.left += size_bytes
                self.changed.notify_all()


@contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with bytes per second on a terminal; what it yields takes the bytes written since the last call."""
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not os.isatty(2)) as bar:
        task = bar.add_task("", total=total_bytes)
        yield lambda size_bytes: bar.advance(task, size_bytes)
