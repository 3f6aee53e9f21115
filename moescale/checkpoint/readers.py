"""Checkpoints that are read while their run goes on: it saves new ones, and removes old ones."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from moescale.config import ConfigError

ATTEMPTS = 50
S = TypeVar("S")
T = TypeVar("T")


class Hold:
    """Keeps a checkpoint from being removed by its run as long as this object lives, where the disk has locks."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError where there is no such folder."""
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a checkpoint for a while. Raises OSError."""
    hold = Hold(folder)
    yield
    del hold


def is_held(folder: Path) -> bool:
    """Say whether somebody reads a checkpoint. Raises OSError where there is no such folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def trying_again(find: Callable[[], S], is_there: Callable[[S], bool], work: Callable[[S], T]) -> T:
    """Find something and work with it; where the work failed because it went away meanwhile, find anew.

    Raises ConfigError where it went away ATTEMPTS times, and what find and work raise.
    """
    for _ in range(ATTEMPTS):
        found = find()
        try:
            return work(found)
        except (ConfigError, OSError):
            if is_there(found):
                raise
    raise ConfigError(f"{ATTEMPTS} checkpoints, one after another, were removed while they were read: give a larger "
                      "checkpoint.keep to the run, or read a copy")
