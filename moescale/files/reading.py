"""Files that others wrote, opened without waiting and read without filling the memory."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from moescale.errors import ConfigError

LARGEST_TEXT = 100_000_000  # bytes of a small file such as a tokenizer
DEEPEST_JSON = 100  # levels of lists and objects


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, also for a pipe, a device or a folder, and never waits."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFREG:
        return open(descriptor, "rb")
    os.close(descriptor)
    number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
    raise OSError(number, "it is a folder" if kind == stat.S_IFDIR else "it is no regular file", str(path))


def read_bytes(path: str | Path, most: int = LARGEST_TEXT) -> bytes:
    """Read the whole of a small regular file. Raises OSError, also for one of more than `most` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content


def read_text(path: str | Path, most: int = LARGEST_TEXT) -> str:
    """Read the whole of a small UTF-8 file. Raises OSError and UnicodeDecodeError."""
    return read_bytes(path, most).decode("utf-8")


def read_json(path: str | Path, most: int = LARGEST_TEXT) -> Any:
    """Read a small JSON file, of DEEPEST_JSON levels at most. Raises OSError and ValueError."""
    return parse_json(read_text(path, most))


def parse_json(text: str) -> Any:
    """Read JSON of DEEPEST_JSON levels at most; numbers that are none (NaN) are refused. Raises ValueError."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST_JSON:
            raise ValueError("it is nested too deeply")
        level = [item for outer in level if isinstance(outer, (list, dict))
                 for item in (outer.values() if isinstance(outer, dict) else outer)]
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def explain(error: Exception) -> str:
    """Say in a few words of one line why a file could not be read."""
    text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    words = " ".join(text.split())
    return (words[:1].lower() + words[1:])[:200] or type(error).__name__


def inside(folder: Path, name: str) -> Path:
    """Name a regular file of a checkpoint. Raises ConfigError for one that lies elsewhere, or is missing.

    In the Hugging Face cache the files of `snapshots/REVISION` are links into `blobs`, which lies beside `snapshots`.
    """
    path, real = folder / name, folder.resolve()
    homes = [real, *(above.parent / "blobs" for above in real.parents if above.name == "snapshots")]
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise ConfigError(f"{folder} names {name!r}, which leads out of it: it was not loaded")
    if not path.is_file():
        raise ConfigError(f"{folder} is damaged: {name} is missing")
    return path
