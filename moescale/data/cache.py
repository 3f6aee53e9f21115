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

from moescale.data.documents import BLOCK_BYTES, STAMP, SourceFile
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
        self._corpus: Path | None = None
        self._in_use: FileLock | None = None  # as long as this object lives

    def content_hashes(self, files: Sequence[SourceFile]) -> dict[str, str]:
        """Hash the content of files, each by its path.

        Of a large corpus, a file is taken for unchanged while its size, inode, and times are the same; its time of
        change is set by the system alone.
        """
        known: dict[str, Any] = {}
        total = sum(file.size_bytes for file in files)
        if total > HASHED_AT_START_BYTES:
            for folder in self.corpora.glob(f"{self.name}-*"):
                known.update(_read(folder).get("sources", {}))
        self._sources: dict[str, Any] = {}
        hashes, done = {}, 0
        with reading("looking for changes", total) as shown:
            for file in files:
                stamp, entry = list(file.stamp), known.get(file.path)
                settled = time.time_ns() - max(file.stamp[1::STAMP] + file.stamp[2::STAMP]) > SETTLED_NS
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
        folder = self.corpora / f"{self.name}-{content}"
        used = {"packs": list(keys), "sources": self._sources}
        for _ in range(100):  # another process may remove what nobody holds yet
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if _read(folder) != used:
                    stored = {"crc32": zlib.crc32(json.dumps(used).encode()), "used": used}
                    replace_text(folder / "packs.json", json.dumps(stored))
                os.utime(folder / "packs.json")
                (folder / "in_use").touch()
                in_use = FileLock(folder / "in_use", shared=True, wait=True)
                if in_use.is_of(folder / "in_use"):
                    self._in_use, self._corpus = in_use, folder
                    return
            except FileNotFoundError:
                continue
            except OSError:
                return

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Let one process at a time write packs of this corpus."""
        self.packs.mkdir(parents=True, exist_ok=True)
        if self._corpus is None:
            raise OSError("the folder cannot be written")
        with lock(self._corpus / "building"):
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
        for folder in self.packs.iterdir():
            pack = open_pack(folder) if _PACK.fullmatch(folder.name) and not folder.name.endswith(".tmp") else None
            if pack is not None and pack.options == options:
                found.update({file.key: (pack, number) for number, file in enumerate(pack.files)})
        return found

    def clean(self) -> None:
        """Remove corpora that are of an older content or were not used for long, and packs of no corpus."""
        kept: set[str] = set()
        with contextlib.suppress(OSError):
            for folder in self.corpora.iterdir():
                if not _CORPUS.fullmatch(folder.name):
                    continue
                if folder != self._corpus and self._is_old(folder):
                    remove(folder)
                elif not _read(folder):
                    return  # it may list anything
                else:
                    kept.update(_read(folder)["packs"])
            for folder in self.packs.iterdir():
                if _PACK.fullmatch(folder.name) and folder.name[:40] not in kept:
                    remove(folder)
            self._clean_older_formats()

    def _is_old(self, folder: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            if is_locked(folder / "in_use", unknown=True):
                return False
            age = time.time() - (folder / "packs.json").stat().st_mtime
            return folder.name.startswith(f"{self.name}-") or age > KEPT_DAYS * 86400 or not _read(folder)
        return True

    def _clean_older_formats(self) -> None:
        for meta in self.directory.glob("*/meta.json"):
            folder = meta.parent
            if re.fullmatch(r"[0-9a-f]{40}", folder.name) and time.time() - meta.stat().st_mtime > KEPT_DAYS * 86400:
                remove(folder)
                folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)


def content_hash(file: SourceFile) -> str:
    """Hash a file's bytes, and those of its index. Raises ConfigError when one cannot be read."""
    digest = hashlib.sha256()
    for path, size in zip(file.paths, file.stamp[::STAMP], strict=True):
        left = size
        with file.readable_errors(), open(path, "rb") as source:
            while left > 0 and (block := source.read(min(left, BLOCK_BYTES))):
                digest.update(block)
                left -= len(block)
            if source.read(1):
                digest.update(b"more")  # the file has grown since it was described, and may go on
    return digest.hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    """Read what a corpus uses; empty when that cannot be read or was damaged."""
    try:
        stored = read_json(folder / "packs.json", LARGEST_LIST)
        used = stored["used"]
        return dict(used) if stored["crc32"] == zlib.crc32(json.dumps(used).encode()) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
