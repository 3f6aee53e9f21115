"""Folders that are not whole yet, or no longer: marked as ours, so that nothing else is ever removed.

Whatever a save or a conversion fills or takes apart holds a file of this name until it is whole, or gone.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

MARK = ".moescale-partial"


def make_marked(folder: Path) -> None:
    """Make a folder that bears the mark. Raises OSError, also where there is one."""
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def unmark(folder: Path) -> None:
    """Say that a folder is whole."""
    (folder / MARK).unlink(missing_ok=True)


def is_ours(folder: Path, older: re.Pattern[str] | None = None) -> bool:
    """Say whether a folder is one that a save or a conversion left: it is marked or empty.

    older: names that versions without the mark gave to all files of such a folder.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return MARK in names or all(older is not None and older.fullmatch(name) for name in names)


def set_aside(folder: Path, aside: Path) -> None:
    """Mark a folder and rename it. Raises OSError."""
    (folder / MARK).touch()
    folder.rename(aside)


def remove_marked(folder: Path) -> None:
    """Remove a folder that is ours, its mark last, so that a kill in between leaves one that is. Raises OSError."""
    (folder / MARK).touch()
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    unmark(folder)
    folder.rmdir()


def discard(folder: Path) -> None:
    """Remove a folder if it bears the mark, as far as that works."""
    with contextlib.suppress(OSError):
        if is_ours(folder):
            remove_marked(folder)
