"""Put a folder into its place whole or not at all, whoever else tries and whoever is killed on the way."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path


def temporary_beside(place: Path) -> Path:
    """Name a new folder beside `place`, on the same disk, that tells which machine and process fills it."""
    return place.with_name(f"{place.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def publish(temporary: Path, place: Path, is_whole: Callable[[], bool]) -> None:
    """Rename a filled folder to `place`; a whole one that stands there already wins, a damaged one goes.

    is_whole: looks at `place`. Raises OSError when the rename fails for another reason.
    """
    for attempt in range(10):
        try:
            temporary.rename(place)
            return
        except OSError:
            if is_whole():
                return
            if attempt == 9 or not place.exists():
                raise
            aside = temporary_beside(place)  # renaming is one step, removing is many
            with contextlib.suppress(FileNotFoundError):
                place.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Wait until no other process holds the lock; a killed holder lets go.

    -> whether this process is alone; False on file systems without locks, where every writer does the work itself
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            alone = False
        else:
            alone = True
        yield alone


def remove_leftovers(place: Path) -> None:
    """Remove what killed writers on this machine left beside `place`; only for the holder of its lock."""
    for leftover in place.parent.glob(f"{place.name}.{socket.gethostname()}-*.tmp"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                leftover.unlink()
