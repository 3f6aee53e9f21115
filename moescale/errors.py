"""What is said when a run cannot work, and the words to say it with."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

LONGEST_MESSAGE = 2000  # characters
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "") -> str:
    """Write out the characters that would break a line, steer a terminal or turn the text around, but those in `keep`.

    Text comes from files of others, by names of tensors, tokens, folders and keys.
    """
    return HIDDEN.sub(lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", text)


CREDENTIALS = re.compile(r"(:/{1,2})(?:[^/\s@]*:[^/\s@]*|[^/\s@]{16,})@")  # of s3:/a:b@c too, as a path is written
SECRET_QUERY = re.compile(
    r"([?&][^=&\s]*(?:token|key|secret|signature|password|credential)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Write stars for names with passwords, and for tokens, in the URLs of a text."""
    return SECRET_QUERY.sub(r"\1***", CREDENTIALS.sub(r"\1***@", text))


class ConfigError(ValueError):
    """A configuration or a file that cannot work; the message, of one line, says what to write instead."""

    def __init__(self, message: str) -> None:
        text = without_secrets(visible(message))
        if len(text) > LONGEST_MESSAGE:
            text = f"{text[: LONGEST_MESSAGE - 500]} ... {text[-500:]}"
        super().__init__(text)


class DamagedError(ConfigError):
    """A checkpoint whose files are not as they were written."""


class TrainingError(RuntimeError):
    """A run that cannot go on, though its configuration is sound; the message says what to try."""


class NotFiniteError(TrainingError):
    """A state that was not saved, since a tensor of it holds what is no finite number.

    step: of the state. name: of the tensor.
    """

    def __init__(self, message: str, step: int, name: str) -> None:
        super().__init__(message)
        self.step, self.name = step, name


class LostRanksError(TrainingError):
    """Ranks that did not meet; every rank that notices says where it stood."""


LOST = ("gloo", "pair closure", "closed by peer", "connection reset", "timed out waiting", "nccl")


def is_of_lost_ranks(error: BaseException) -> bool:
    """Whether an error comes of other ranks that are gone or late: one of the communication library's, or our own."""
    if isinstance(error, TrainingError):
        return isinstance(error, LostRanksError)
    library = any(base.__name__ == "DistError" for base in type(error).__mro__)  # torch's, which is not imported here
    return library or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST))


class Stopped(BaseException):
    """A run that was asked to end, and did so in good order; the message says where it can go on.

    No Exception, so that nothing on the way out takes it for a fault. status: with which the process leaves.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Silenced(Exception):
    """Another rank says what ended the run; this one leaves with the same status and no word."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


OUT_OF_MEMORY = re.compile(r"out of memory|can(not|'t) allocate memory|unable to allocate|ALLOC_FAILED|"
                           r"storage size calculation overflowed", re.IGNORECASE)


def memory_asked(error: BaseException) -> str | None:
    """Say how much memory was asked for in vain; none where an error is another one."""
    said = str(error)
    if not isinstance(error, MemoryError) and not (
            isinstance(error, RuntimeError | OSError) and OUT_OF_MEMORY.search(said)):
        return None
    size = re.search(r"allocate ([0-9.]+) ?([KMGTP]i?B|bytes)", said)
    if size is None:
        return "more than there is"
    return f"{float(size[1]) / 2**30:,.2f} GiB" if size[2] == "bytes" else f"{size[1]} {size[2]}"


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
    return any_of(factors(number))


def factors(number: int) -> list[int]:
    """List the numbers that divide another, in order, in the time of its square root."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return [*low, *(number // n for n in reversed(low) if n * n != number)]


def any_of(choices: Sequence[int | str]) -> str:
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
