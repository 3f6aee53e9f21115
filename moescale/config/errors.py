"""What is said when a run cannot work, and the words to say it with."""

from __future__ import annotations

import re
from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration that cannot work; the message says what to write instead."""


class TrainingError(RuntimeError):
    """A run that cannot go on, though its configuration is sound; the message says what to try."""


class LostRanksError(TrainingError):
    """Ranks that did not meet; every rank that notices says where it stood."""


def refuse(condition: bool, message: str) -> None:
    if condition:
        raise ConfigError(message)


def check_local(path: str) -> str:
    """Refuse a path that is empty or a URL, which would be taken for a folder of that name. -> the path"""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path)  # of at least two letters, since one is a drive
    refuse(scheme is not None, "files are read and written in mounted file systems alone: mount it and write the path "
                               "there, or write a local path and copy")
    refuse(not path.strip(), "a path must not be empty: write . for the current folder")
    return path


def check_width(name: str, width: int) -> None:
    nearest = max(8, round(width / 8) * 8)
    refuse(width % 8 != 0, f"{name}={width} must be a multiple of 8 (16-byte rows in bfloat16): use {nearest}")


def divisors(number: int) -> str:
    return any_of([n for n in range(1, number + 1) if number % n == 0])


def any_of(choices: Sequence[int | str]) -> str:
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
