"""Checkpoints that are read while their run goes on: it saves new ones, and removes old ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from moescale.config import ConfigError

ATTEMPTS = 50
S = TypeVar("S")
T = TypeVar("T")


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
