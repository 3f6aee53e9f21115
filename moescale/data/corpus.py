"""Text files -> documents. Without files: the source of the running Python's own standard library."""

from __future__ import annotations

import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from moescale.config import ConfigError

SUFFIXES = (".txt", ".py", ".md", ".jsonl")


def find_files(patterns: tuple[str, ...]) -> list[Path]:
    """Resolve paths and globs, sorted, each file once; no patterns give the standard library's *.py files.

    Raises ConfigError for a pattern without a file and for a file of a kind that is not read.
    """
    if not patterns:
        return _standard_library()
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True)]
        if not matches:
            raise ConfigError(f"data.files: {pattern} names no file: write a path or a glob such as texts/**/*.txt")
        if len(matches) == 1 and matches[0].is_dir():
            raise ConfigError(f"data.files: {pattern} is a folder: write {pattern.rstrip('/')}/**/*.txt or the like")
        found.update(match.resolve() for match in matches if match.is_file())
    for path in found:
        if not path.name.removesuffix(".gz").endswith(SUFFIXES):
            raise ConfigError(f"data.files: {path} is not read: give {', '.join(SUFFIXES)}, each also with .gz")
    return sorted(found)


def read_documents(files: list[Path], skip_undecodable: bool) -> Iterator[str]:
    """Read one document a file, or one a line of .jsonl (its `text`); empty ones are left out.

    skip_undecodable: pass over files that are not UTF-8 text. Raises ConfigError naming file and line.
    """
    for path in files:
        try:
            text = _read(path)
        except ConfigError:
            if not skip_undecodable:
                raise
            continue
        name = path.name.removesuffix(".gz")
        yield from (document for document in (_lines(path, text) if name.endswith(".jsonl") else [text]) if document)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not foreign.intersection(path.relative_to(root).parts)]
    if not files:
        raise ConfigError(f"this Python has no source of its standard library in {root}: write data.files=[...]")
    return sorted(files)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.name.endswith(".gz"):
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"data.files: {path} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise ConfigError(f"data.files: {path} cannot be read: {error.strerror}") from None
    if b"\0" in data:
        raise ConfigError(f"data.files: {path} is binary (it holds zero bytes): give text in UTF-8, or leave it out")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.files: {path} is not UTF-8 text (byte {error.start}): convert it, e.g. with "
                          f"iconv -t utf-8, or leave it out") from None


def _lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"data.files: {path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ConfigError(f'data.files: {path}, line {number} has no text: write {{"text": "..."}}')
        yield record["text"]
