"""Put a folder into its place whole or not at all, whoever else tries and whoever is killed on the way."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from moescale.files.locks import FileLock, is_locked


def temporary_beside(target: Path) -> Path:
    """Name a new folder beside `target`, on the same disk, that tells which machine and process fills it."""
    return target.with_name(f"{target.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Make a folder beside `target` and lock it while it is filled; it is gone afterwards, unless it was renamed."""
    temporary = temporary_beside(target)
    temporary.mkdir()
    try:
        with FileLock(temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, target: Path, is_whole: Callable[[], bool]) -> None:
    """Rename a filled folder to `target`; a whole one that stands there already wins, a damaged one goes.

    is_whole: looks at `target`. Raises OSError when the rename fails for another reason.
    """
    for attempt in range(10):
        try:
            temporary.rename(target)
            return
        except OSError:
            if is_whole():
                return
            if attempt == 9 or not target.exists():
                raise
            remove(target)


def remove(target: Path) -> None:
    """Remove a folder so that it is never seen in part; one that is gone already is none to complain about."""
    aside = temporary_beside(target)  # renaming is one step, removing is many
    with contextlib.suppress(FileNotFoundError):
        target.rename(aside)
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink()


def remove_leftovers(target: Path) -> None:
    """Remove what killed writers left beside `target`."""
    ours = re.compile(re.escape(target.name) + r"\..+-[0-9]+-[0-9a-f]{8}\.tmp")
    for leftover in target.parent.glob(f"{target.name}.*.tmp"):
        if ours.fullmatch(leftover.name) and not is_locked(leftover, unknown=True):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    leftover.unlink()
