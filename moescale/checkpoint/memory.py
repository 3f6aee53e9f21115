"""Copies of a run in the memory of hosts, which outlive the processes of its ranks.

A copy is a folder `step_00000100` on a file system in memory: the files of tensors that the ranks of
this host wrote, those that the ranks of another host sent, and all small files of a checkpoint, so that
any hosts that hold all files of tensors between them hold a checkpoint. `copy.json` holds the state for
the manifest, the files with sizes and checksums, and `after`, the newest checkpoint on the disk at that
time; a folder is whole, as far as its host goes, when it has lost its mark.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moescale.checkpoint.capture import Capture
from moescale.checkpoint.index import INDEX
from moescale.checkpoint.store import FILE
from moescale.checkpoint.tensor_files import check_sums, not_finite, unlike, write_tensors
from moescale.checkpoint.together import Failed, Ranks, limited
from moescale.config import ConfigError
from moescale.files.leftovers import MARK, make_marked, unmark
from moescale.files.reading import read_json
from moescale.files.writing import sync

COPY = "copy.json"
FOLDER = re.compile(r"step_([0-9]{8,15})")
CHUNK_BYTES = 1 << 28  # sent at a time


@dataclass(frozen=True)
class MemoryPlace:
    """Where the ranks of one host keep copies, and to whom they send them.

    folder: of this host. send_to: of each rank, the rank on another host that it sends its part to; None where there is
    no other host. first: whether this rank keeps what is common to the ranks of its host.
    """

    folder: Path
    send_to: Sequence[int | None]
    first: bool


class MemoryCopies:
    """Makes copies of a run in the memory of its hosts; all ranks make each together."""

    def __init__(
        self, place: MemoryPlace, group: dist.ProcessGroup | None, on_disk: Callable[[], Path | None]
    ) -> None:
        """group: of all ranks, for these copies alone. on_disk: says which checkpoint on the disk is the newest."""
        self._place, self._ranks, self._on_disk = place, Ranks(group), on_disk

    def write(self, moment: Capture) -> Path:
        """Keep a moment, and let go of the one before when every host has this one.

        Returns the folder. Raises ConfigError, on every rank, where it could not be kept; the one before stays.
        """
        ranks, folder = self._ranks, self._place.folder / f"step_{moment.step:08d}"
        try:
            with limited(f"copying step {moment.step} to memory"):
                spoilt = not_finite(moment.tensors, ranks)
                if spoilt is not None:
                    raise Failed(f"{spoilt} holds values that are no finite numbers")
                ranks.together(lambda: self._make_room(folder))
                self._fill(folder, moment)
                ranks.together(lambda: unmark(folder) if self._place.first else None)
        except Failed as error:
            if self._place.first:
                shutil.rmtree(folder, ignore_errors=True)
            raise ConfigError(f"no copy of step {moment.step} could be kept in "
                              f"{self._place.folder.parent}: {error}") from None
        if self._place.first:
            for older in _folders(self._place.folder):
                if older != folder:
                    shutil.rmtree(older, ignore_errors=True)
        return folder

    def clear(self) -> None:
        """Let go of all copies on this host."""
        if self._place.first:
            for folder in _folders(self._place.folder):
                shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Let go of all copies, and of their place, where the run no longer needs them."""
        if self._place.first:
            shutil.rmtree(self._place.folder, ignore_errors=True)
            with suppress(OSError):  # other hosts on this machine may have theirs there
                self._place.folder.parent.rmdir()

    def _make_room(self, folder: Path) -> None:
        if self._place.first:
            if folder.exists():  # of a run that did this step before
                shutil.rmtree(folder)
            make_marked(folder)

    def _fill(self, folder: Path, moment: Capture) -> None:
        """Write this rank's file, exchange files with other hosts, and add what is common to all ranks."""
        ranks = self._ranks
        ranks.together(lambda: write_tensors(folder, dict(moment.tensors), ranks, synced=False))
        found = ranks.together(lambda: check_sums(folder, f"__{ranks.rank}_*"))
        index = ranks.together(lambda: (folder / INDEX).read_bytes() if ranks.rank == 0 else b"")
        files = ranks.gather(found)
        on_disk = self._on_disk()
        after = "" if on_disk is None else on_disk.name
        state, after, index = ranks.gather(({"step": moment.step, **moment.state}, after, index))[0]
        parts = ranks.together(lambda: self._parts(folder, files))
        for work in [part.begin(ranks.group) for part in parts]:
            work.wait()
        ranks.together(lambda: self._check_received(folder, files))

        def finish() -> None:
            small = {INDEX: index, **moment.files}
            for name, content in small.items():
                (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
            listing = {name: sums for of_rank in files for name, sums in of_rank.items()}
            listing |= {name: check_sums(folder, name)[name] for name in small}
            (folder / COPY).write_text(json.dumps({"state": state, "after": after, "files": listing}, sort_keys=True))

        ranks.together(finish if self._place.first else lambda: None)

    def _parts(self, folder: Path, files: Sequence[Mapping[str, Sequence[int]]]) -> list[_Part]:
        """Map what this rank sends and receives into memory. files: of each rank, by name, with size and checksum."""
        rank, parts = self._ranks.rank, list[_Part]()
        for sender, receiver in enumerate(self._place.send_to):
            if receiver is None or rank not in (sender, receiver):
                continue
            for name, (size, _) in sorted(files[sender].items()):
                whole = _mapped(folder / name, size, fresh=rank == receiver)
                peer = receiver if rank == sender else sender
                parts += [_Part(part, peer, rank == sender) for part in whole.split(CHUNK_BYTES)]
        return parts

    def _check_received(self, folder: Path, files: Sequence[Mapping[str, Sequence[int]]]) -> None:
        for sender, receiver in enumerate(self._place.send_to):
            for name in files[sender] if self._ranks.rank == receiver else ():
                if check_sums(folder, name)[name] != files[sender][name]:
                    raise ConfigError(f"{name} arrived with other bytes than rank {sender} sent")


@dataclass(frozen=True)
class _Part:
    """Bytes that are on their way between two ranks. peer: the other one. sends: whether this rank has them."""

    values: Tensor
    peer: int
    sends: bool

    def begin(self, group: dist.ProcessGroup | None) -> dist.Work:
        work = (dist.isend if self.sends else dist.irecv)(self.values, self.peer, group=group)
        assert work is not None
        return work


def _mapped(path: Path, size: int, *, fresh: bool) -> Tensor:
    """Map a file into memory: [size] uint8. fresh: a new one, whose memory is taken at once. Raises OSError."""
    if fresh:
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a file system that is full would end the process later
    return torch.from_file(str(path), shared=fresh, size=size, dtype=torch.uint8)


def _folders(place: Path) -> list[Path]:
    return [folder for folder in place.iterdir() if FOLDER.fullmatch(folder.name)] if place.is_dir() else []


def held(home: Path) -> list[dict[str, Any]]:
    """List the copies that lie on this machine: `copy` as in copy.json, `present` the names of its files here.

    home: the folder that holds those of each host. What cannot be read is left out.
    """
    found = []
    for place in home.iterdir() if home.is_dir() else ():
        for folder in _folders(place):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                if (folder / MARK).exists():
                    continue
                copy = read_json(folder / COPY)
                if copy["state"]["step"] != int(folder.name.removeprefix("step_")) or type(copy["after"]) is not str:
                    continue
                present = [name for name, (size, _) in copy["files"].items()
                           if FILE.fullmatch(name) and unlike(folder / name, size, None) is None]
                found.append({"copy": copy, "present": present})
    return found


def bring(home: Path, step: int, name: str, target: Path, sums: Sequence[int]) -> None:
    """Bring one file of a copy from this machine's memory to the disk. sums: its size and checksum.

    Raises ConfigError where no copy holds these bytes, and OSError.
    """
    for place in home.iterdir():
        source = place / f"step_{step:08d}" / name
        if source.is_file() and check_sums(source.parent, name)[name] == list(sums):
            with source.open("rb") as file, target.open("wb") as to:
                shutil.copyfileobj(file, to, 1 << 22)
            sync(target)
            return
    raise ConfigError(f"{name} of step {step} in {home} was altered")
