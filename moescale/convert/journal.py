"""A folder that is filled beside its place: what is done is remembered, so that a killed conversion goes on."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moescale.config import ConfigError
from moescale.files.leftovers import is_ours, make_marked, unmark
from moescale.files.locks import FileLock
from moescale.files.reading import parse_json, read_text
from moescale.files.writing import sync, sync_tree, write_synced

LARGEST_JOURNAL = 1 << 30  # bytes
COMMIT_BYTES = 1 << 28  # written between two moments at which what is done is made certain


class Journal:
    """`DEST.partial`: `data` becomes the destination; `journal.jsonl` names what in it is done, and its digests."""

    def __init__(self, destination: Path, plan: str) -> None:
        """Open the folder, or make it. Raises ConfigError where another conversion is at work in it.

        plan: what the conversion is; what another plan left is cleared away.
        """
        self.destination = destination
        self.folder = destination.with_name(destination.name + ".partial")
        self.data = self.folder / "data"
        self._file = self.folder / "journal.jsonl"
        self._guard = threading.RLock()
        self._waiting: dict[str, list[str]] = {}  # digests of what was written since the last commit
        self._bytes = 0  # of it
        # the folder is ours, and nobody else's
        if not self.folder.exists() and not self.folder.is_symlink():
            with contextlib.suppress(FileExistsError):  # another conversion may have made it just now
                make_marked(self.folder)
        if not is_ours(self.folder) and not any("plan" in line for line in _lines(self._file)):
            raise ConfigError(f"{self.folder} is in the way, and no conversion left it: move it away, or give another "
                              "destination")
        self._lock = FileLock(self.folder)
        if not self._lock.taken:
            raise ConfigError(f"{self.folder} is being written by another conversion: wait for it")
        # what is done of the same plan stays
        lines = list(_lines(self._file))
        self.done: dict[str, list[str]] = {}  # digests of what is certain to lie there, by tensor
        if lines and lines[0].get("plan") == plan and self.data.is_dir():
            self.done = {line["weight"]: line["digests"] for line in lines[1:]}
        else:
            self._clear()
            self._append([{"plan": plan}])

    def fresh(self) -> Path:
        """Make an empty folder, to lay files out in."""
        folder = self.folder / "fresh"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def adopt(self, fresh: Path) -> None:
        """Take laid out files as those to fill, unless there are some that were filled in part."""
        if self.data.is_dir():
            shutil.rmtree(fresh)
        else:
            fresh.rename(self.data)

    def finished(self, weight: str, digests: list[str], size_bytes: int) -> None:
        """Remember that a tensor is written; any thread may call."""
        with self._guard:
            self._waiting[weight] = digests
            self._bytes += size_bytes
            if self._bytes >= COMMIT_BYTES:
                self.commit()

    def commit(self) -> None:
        """Wait until all that was finished is on the disk: first the data, then the word that it is there."""
        with self._guard:
            sync_tree(self.data)
            self._append({"weight": weight, "digests": digests} for weight, digests in self._waiting.items())
            self.done.update(self._waiting)
            self._waiting, self._bytes = {}, 0

    def publish(self) -> None:
        """Put the data into its place, in one step."""
        sync_tree(self.data)
        if self.destination.is_dir():
            self.destination.rmdir()  # an empty one; rename would not replace it everywhere
        self.data.rename(self.destination)
        sync(self.destination.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the folder, but for what somebody else put there."""
        with contextlib.suppress(OSError):
            self._clear()
            unmark(self.folder)
            self.folder.rmdir()

    def close(self) -> None:
        """Let others have the folder."""
        self._lock.close()

    def _clear(self) -> None:
        for name in ("data", "fresh"):
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)
        self._file.unlink(missing_ok=True)

    def _append(self, values: Iterable[Any]) -> None:
        write_synced(self._file, "".join(json.dumps(value) + "\n" for value in values), append=True)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read whole lines; the last may have been cut off."""
    try:
        text = read_text(path, LARGEST_JOURNAL)
    except (OSError, UnicodeDecodeError):
        return
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            value = parse_json(line)
            if isinstance(value, dict):
                yield value
