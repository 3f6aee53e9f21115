"""What is said when a run cannot work, and the words to say it with."""

from __future__ import annotations

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
