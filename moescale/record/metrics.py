"""`metrics.jsonl`, one object per logged step, and the sinks that figures go to."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from moescale.files.reading import open_regular
from moescale.files.writing import replace_bytes
from moescale.record.figures import Line

FILE = "metrics.jsonl"
LONGEST_LINE = 64_000_000  # bytes
LARGEST_STEP = 1 << 53
MOST_WAITING = 10_000  # lines


class Sink(Protocol):
    """What takes the figures of a run."""

    def write(self, step: int, metrics: Line) -> None:
        """Take the figures of one step, by the keys of `figures.py`."""

    def saved(self, step: int, checkpoint: Path) -> None:
        """A checkpoint is on disk."""

    def close(self) -> None:
        """Nothing follows."""


class JsonLines:
    """A sink that adds a line to `metrics.jsonl`. Lines of steps that a resumed run does again are dropped first.

    A disk that takes nothing ends no run: lines wait in memory, and go there with the next one that it takes.
    """

    def __init__(self, run_dir: Path, first_step: int, report: Callable[[str], None]) -> None:
        """Drop the lines from first_step on, which belong to a run that was cut off. Raises OSError.

        report: is told where the disk takes nothing, and where it does again.
        """
        self.path, self._report = run_dir / FILE, report
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._first: int | None = first_step  # where lines must be dropped before others are added
        self._refused = False
        self._drop()

    def go_back(self, first_step: int) -> None:
        """Drop the lines from this step on, now or as soon as the disk lets it."""
        whole = (parse_line(text) for text in self._waiting)
        kept = [text for text, line in zip(self._waiting, whole, strict=True) if line and line["step"] < first_step]
        self._waiting = deque(kept, MOST_WAITING)
        self._first = first_step if self._first is None else min(self._first, first_step)
        self._flush()

    def write(self, step: int, metrics: Line) -> None:
        self._waiting.append(json.dumps({"step": step, **metrics}).encode() + b"\n")
        self._flush()

    def saved(self, step: int, checkpoint: Path) -> None:
        pass

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        try:
            self._drop()
            self._add()
        except OSError as error:
            if not self._refused:
                self._report(f"{self.path} cannot be written: {error.strerror}; its lines wait in memory, and the run "
                             "goes on")
            self._refused = True
        else:
            if self._refused:
                self._report(f"{self.path} is written again, with the lines that waited")
            self._refused = False

    def _drop(self) -> None:
        """Drop the lines of steps that are done again. Raises OSError."""
        if self._first is not None and self.path.exists():
            with open_regular(self.path) as file:
                whole = file.read()
                file.seek(0)
                steps = ((text, parse_line(text)) for text in raw_lines(file))
                kept = b"".join(text.rstrip(b"\n") + b"\n" for text, line in steps
                                if line is not None and line["step"] < self._first)
            if kept != whole:
                replace_bytes(self.path, kept)
        self._first = None

    def _add(self) -> None:
        """Add the lines that wait, all or none. Raises OSError."""
        with self.path.open("ab", buffering=0) as file:
            end, text = file.seek(0, os.SEEK_END), b"".join(self._waiting)
            try:
                if file.write(text) < len(text):  # what a disk does that is just full
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise
        self._waiting.clear()


def raw_lines(file: BinaryIO) -> Iterator[bytes]:
    """Give each line of a file, whole or not, cut where it is too long to be one."""
    while text := file.readline(LONGEST_LINE):
        yield text


def parse_line(text: bytes) -> dict[str, Any] | None:
    """Read one line; None where it has no step, was cut off in the middle or is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # also for bytes that are no UTF-8
        return None
    if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < LARGEST_STEP:
        return line
    return None


def read_lines(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Give each line of a run that is whole; a run under way may be writing the last one."""
    return (line for line in map(parse_line, raw_lines(file)) if line is not None)
