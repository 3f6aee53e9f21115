"""Checkpoints that are copied to a storage of any kind, by URL, and come back from there.

A checkpoint lies there as on the disk, in a folder `step_00000100`, whose manifest is written last:
without it the folder does not count. fsspec knows the kinds of storage; some need a package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import fsspec
import torch.distributed as dist

from moescale.checkpoint.store import MANIFEST, NAME, read_files, step_of
from moescale.checkpoint.tensor_files import unlike
from moescale.checkpoint.together import Failed, Ranks, describe
from moescale.config import ConfigError
from moescale.files.writing import sync

T = TypeVar("T")


class RemoteStorage:
    """A folder by its URL, which holds the checkpoints of one run."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a kind of storage that is not known or needs a package that is missing."""
        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.url_to_fs(self.url)
        except ImportError as error:
            named = re.search(r"install (\w+)", str(error), re.IGNORECASE)
            raise ConfigError(f"checkpoint.url={url} needs a package: pip install {named[1] if named else error}, or "
                              "write checkpoint.url=null") from None
        except Exception as error:
            raise ConfigError(f"checkpoint.url={url} cannot be used: {describe(error)}") from None

    def push(self, folder: Path, keep: int, group: dist.ProcessGroup | None) -> None:
        """Copy a checkpoint there, and let go of all but the last `keep` up to it; all ranks call, each copies a share.

        Raises ConfigError on every rank where it could not be copied; what lay there of other steps stays.
        """
        ranks, target, step = Ranks(group), f"{self._root}/{folder.name}", step_of(folder.name)
        old: list[int] = []

        def begin() -> None:
            there = self.steps()
            if step in there:  # of a course that the run has left: half of each would count as whole
                with suppress(Exception):  # then it does so until all is written
                    self._remove(step)
            old.extend([other for other in there if other < step][: 1 - keep or None])
            self._told(lambda: self._files.makedirs(target, exist_ok=True))

        def put(names: Sequence[str]) -> None:
            for name in names:
                self._files.put_file(str(folder / name), f"{target}/{name}")

        try:
            ranks.on_first(begin)
            names = sorted(ranks.together(lambda: read_files(folder)))
            ranks.together(lambda: self._told(lambda: put(names[ranks.rank :: ranks.size])))
            ranks.on_first(lambda: self._told(lambda: put([MANIFEST])))
        except Failed as error:
            raise ConfigError(f"{folder} is on the disk, but could not be copied to {self.url}: {error}") from None
        for other in old:
            with suppress(Exception):  # it goes after a later save
                self._remove(other)

    def remove_after(self, checkpoint: Path, group: dist.ProcessGroup | None) -> None:
        """Let go of checkpoints of later steps than this one, from which a run takes another course; all ranks call.

        Raises ConfigError on every rank where they could not be removed.
        """
        step = step_of(checkpoint.name)

        def remove() -> None:
            for later in reversed(self.steps()):
                if later > step:
                    self._told(partial(self._remove, later))

        try:
            Ranks(group).on_first(remove)
        except Failed as error:
            raise ConfigError(f"what is newer than step {step}, to which the run goes back, could not be removed from "
                              f"{self.url}: {error}; remove it there, or a new run.dir begins with it") from None

    def steps(self) -> list[int]:
        """List the steps of the checkpoints that lie there whole, in order. Raises ConfigError."""
        def find() -> list[int]:
            self._files.invalidate_cache()
            if not self._files.exists(self._root):
                return []
            names = [str(path).rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False)]
            return sorted(step_of(name) for name in names
                          if NAME.fullmatch(name) and self._files.exists(f"{self._root}/{name}/{MANIFEST}"))

        return self._told(find)

    def fetch(self, step: int, name: str, target: Path, sums: Sequence[int] | None = None) -> None:
        """Bring one file of a checkpoint to the disk. sums: its size and checksum, if they are known.

        Raises ConfigError, also where it has other bytes.
        """
        source = f"{self._root}/step_{step:08d}/{name}"
        self._told(lambda: self._files.get_file(source, str(target)))
        sync(target)
        problem = None if sums is None else unlike(target, *sums)
        if problem is not None:
            raise ConfigError(f"{self.url}/step_{step:08d}/{name} {problem}")

    def _remove(self, step: int) -> None:
        """Let go of a checkpoint, which counts no longer as soon as its manifest is gone. Raises whatever fails."""
        self._files.rm_file(f"{self._root}/step_{step:08d}/{MANIFEST}")
        self._files.rm(f"{self._root}/step_{step:08d}", recursive=True)

    def _told(self, work: Callable[[], T]) -> T:
        """Turn whatever a storage raises into one line. Raises ConfigError."""
        try:
            return work()
        except Exception as error:
            raise ConfigError(f"{self.url}: {describe(error)}") from None
