"""Files that take the place of others whole or not at all, and what has to be on the disk before work goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moescale.files.locks import FileLock
from moescale.files.publish import remove_leftovers, temporary_beside


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `place` that takes its place when the block ends well, and is gone when it does not.

    Any number of processes may do so at once. Raises OSError.
    """
    remove_leftovers(target)
    temporary = temporary_beside(target)
    try:
        with temporary.open("xb") as file, FileLock(temporary):
            yield file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def replace_bytes(target: Path, content: bytes) -> None:
    """Put bytes in the place of a file's, whole or not at all. Raises OSError."""
    with replacing(target) as file:
        file.write(content)


def replace_text(target: Path, text: str) -> None:
    """Put a text in the place of a file's, whole or not at all. Raises OSError."""
    replace_bytes(target, text.encode())


def write_synced(path: Path, content: str | bytes, *, append: bool = False) -> None:
    """Write a file, or more at its end, and wait until it is on the disk. Raises OSError."""
    with path.open("ab" if append else "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the list of what a folder holds, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until all that lies in a folder is on the disk. Raises OSError."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
