"""The folder that tokenized text is kept in: packs, and which corpus uses which of them.

`packs/KEY/` is a pack, KEY a hash of all that its tokens depend on. `corpora/NAME-CONTENT/packs.json` lists the packs
of one corpus; NAME stands for what the configuration says, CONTENT for what was found there. Processes that use a
corpus hold a shared lock on `in_use` beside it. When something new has been written, corpora are removed that nobody
uses and that are of an older content, or that nobody used for KEPT_DAYS; then the packs that no corpus lists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moescale.data.documents import BLOCK_BYTES, SourceFile
from moescale.data.pack import LARGEST_LIST, Pack, open_pack
from moescale.data.progress import reading
from moescale.files.locks import FileLock, is_locked, lock
from moescale.files.publish import remove
from moescale.files.reading import read_json
from moescale.files.writing import replace_text

KEPT_DAYS = 30
CHECKED_AT_START_BYTES = 2**32  # tokens beyond are checked as they are read
HASHED_AT_START_BYTES = 2**30  # the files of a larger corpus are read again only when their stamp has changed
SETTLED_NS = 10**10  # a file that changed less long ago could change again without another time
_PACK = re.compile(r"[0-9a-f]{40}(\..*\.tmp)?")
_CORPUS = re.compile(r"[0-9a-f]{20}-[0-9a-f]{20}(\..*\.tmp)?")


class TokenCache:
    """A cache folder, seen by one corpus. name: of what the configuration says of the corpus."""

    def __init__(self, directory: Path, name: str) -> None:
        self.packs, self.corpora, self.name = directory / "packs", directory / "corpora", name
        self.directory = directory
        self._place: Path | None = None
        self._in_use: FileLock | None = None  # as long as this object lives

    def content_hashes(self, files: Sequence[SourceFile]) -> dict[str, str]:
        """Hash the content of files, each by its path.

        Of a large corpus, a file is taken for unchanged while its size, inode, and times are the same; its time of
        change is set by the system alone.
        """
        known: dict[str, Any] = {}
        total = sum(file.size_bytes for file in files)
        if total > HASHED_AT_START_BYTES:
            for place in self.corpora.glob(f"{self.name}-*"):
                known.update(_read(place).get("sources", {}))
        self._sources: dict[str, Any] = {}
        hashes, done = {}, 0
        with reading("looking for changes", total) as shown:
            for file in files:
                stamp, entry = list(file.stamp), known.get(file.path)
                settled = time.time_ns() - max(file.stamp[1:3]) > SETTLED_NS
                if not (isinstance(entry, list) and entry[:-1] == stamp):
                    entry = [*stamp, content_hash(file)]
                hashes[file.path] = entry[-1]
                if settled and total > HASHED_AT_START_BYTES:
                    self._sources[file.path] = entry
                done += file.size_bytes
                shown.advance(done, file.path, 0)
        return hashes

    def claim(self, keys: Sequence[str]) -> None:
        """Note that this corpus uses these packs, and hold on to them; where nothing can be written, do without."""
        content = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:20]
        place = self.corpora / f"{self.name}-{content}"
        used = {"packs": list(keys), "sources": self._sources}
        for _ in range(100):  # another process may remove what nobody holds yet
            try:
                place.mkdir(parents=True, exist_ok=True)
                if _read(place) != used:
                    stored = {"crc32": zlib.crc32(json.dumps(used).encode()), "used": used}
                    replace_text(place / "packs.json", json.dumps(stored))
                os.utime(place / "packs.json")
                (place / "in_use").touch()
                in_use = FileLock(place / "in_use", shared=True, wait=True)
                if in_use.is_of(place / "in_use"):
                    self._in_use, self._place = in_use, place
                    return
            except FileNotFoundError:
                continue
            except OSError:
                return

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Let one process at a time write packs of this corpus."""
        self.packs.mkdir(parents=True, exist_ok=True)
        if self._place is None:
            raise OSError("the folder cannot be written")
        with lock(self._place / "building"):
            yield

    def open(self, key: str, checked_bytes: int) -> Pack | None:
        """Open a pack; None when it is absent or damaged. checked_bytes: of tokens, how many to check for damage."""
        pack = open_pack(self.packs / key)
        if pack is None or not pack.is_sound(0, min(len(pack.tokens), checked_bytes // pack.tokens.itemsize)):
            return None
        return pack

    def files_of_other_packs(self, options: str) -> dict[str, tuple[Pack, int]]:
        """Find what other packs hold: for a file's key, a pack that was written with these options, and its number."""
        found = {}
        for place in self.packs.iterdir():
            pack = open_pack(place) if _PACK.fullmatch(place.name) and not place.name.endswith(".tmp") else None
            if pack is not None and pack.options == options:
                found.update({file.key: (pack, number) for number, file in enumerate(pack.files)})
        return found

    def clean(self) -> None:
        """Remove corpora that are of an older content or were not used for long, and packs of no corpus."""
        kept: set[str] = set()
        with contextlib.suppress(OSError):
            for place in self.corpora.iterdir():
                if not _CORPUS.fullmatch(place.name):
                    continue
                if place != self._place and self._is_old(place):
                    remove(place)
                elif not _read(place):
                    return  # it may list anything
                else:
                    kept.update(_read(place)["packs"])
            for place in self.packs.iterdir():
                if _PACK.fullmatch(place.name) and place.name[:40] not in kept:
                    remove(place)
            self._clean_older_formats()

    def _is_old(self, place: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            if is_locked(place / "in_use", unknown=True):
                return False
            age = time.time() - (place / "packs.json").stat().st_mtime
            return place.name.startswith(f"{self.name}-") or age > KEPT_DAYS * 86400 or not _read(place)
        return True

    def _clean_older_formats(self) -> None:
        for meta in self.directory.glob("*/meta.json"):
            place = meta.parent
            if re.fullmatch(r"[0-9a-f]{40}", place.name) and time.time() - meta.stat().st_mtime > KEPT_DAYS * 86400:
                remove(place)
                place.with_name(f"{place.name}.lock").unlink(missing_ok=True)


def content_hash(file: SourceFile) -> str:
    """Hash a file's bytes. Raises ConfigError when it cannot be read."""
    digest, left = hashlib.sha256(), file.size_bytes
    with file.readable_errors(), open(file.path, "rb") as source:
        while left > 0 and (block := source.read(min(left, BLOCK_BYTES))):
            digest.update(block)
            left -= len(block)
        if source.read(1):
            digest.update(b"more")  # the file has grown since it was described, and may go on
    return digest.hexdigest()


def _read(place: Path) -> dict[str, Any]:
    """Read what a corpus uses; empty when that cannot be read or was damaged."""
    try:
        stored = read_json(place / "packs.json", LARGEST_LIST)
        used = stored["used"]
        return dict(used) if stored["crc32"] == zlib.crc32(json.dumps(used).encode()) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
