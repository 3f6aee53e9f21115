"""Locks on files and folders that a process holds until it lets go or ends, and that nobody needs to clear away."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class FileLock:
    """An open file or folder, locked until it is closed or this object is gone.

    On a file system without locks nobody is kept out, and the lock counts as taken.
    """

    def __init__(self, path: Path, *, shared: bool = False, wait: bool = False) -> None:
        """Lock what lies at `path`; `taken` says whether that worked.

        shared: with others that share. wait: until the others have let go. Raises OSError where nothing lies there.
        """
        access = os.O_RDONLY if path.is_dir() else os.O_RDWR  # network disks lock what may be written alone
        self._descriptor: int | None = os.open(path, access)
        self.taken = self.works = True
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(self._descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            self.taken = False
        except OSError:
            self.works = False

    def is_of(self, path: Path) -> bool:
        """Say whether what is locked still lies at `path`. Raises OSError where nothing does."""
        return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), os.stat(path))

    def close(self) -> None:
        """Let go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Make a file and wait until no other process has it locked; on file systems without locks nobody waits."""
    path.touch()
    with FileLock(path, wait=True):
        yield


def is_locked(path: Path, *, unknown: bool) -> bool:
    """Say whether a process has a file or folder locked, or `unknown` where locks do not work."""
    try:
        with FileLock(path) as attempt:
            return not attempt.taken if attempt.works else unknown
    except FileNotFoundError:
        return False
    except OSError:  # a file that this process may not write
        return unknown
