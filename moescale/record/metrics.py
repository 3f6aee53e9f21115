"""`metrics.jsonl`, one object per logged step, and the sinks that figures go to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from moescale.files.reading import open_regular
from moescale.files.writing import replace_bytes
from moescale.record.figures import Line

FILE = "metrics.jsonl"
LONGEST_LINE = 64_000_000  # bytes
LARGEST_STEP = 1 << 53


class Sink(Protocol):
    """What takes the figures of a run."""

    def write(self, step: int, metrics: Line) -> None:
        """Take the figures of one step, by the keys of `figures.py`."""

    def saved(self, step: int, checkpoint: Path) -> None:
        """A checkpoint is on disk."""

    def close(self) -> None:
        """Nothing follows."""


class JsonLines:
    """A sink that adds a line to `metrics.jsonl`. Lines of steps that a resumed run does again are dropped first."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Drop the lines from first_step on, which belong to a run that was cut off. Raises OSError."""
        self.path = run_dir / FILE
        if self.path.exists():
            with open_regular(self.path) as file:
                whole = file.read()
                file.seek(0)
                steps = ((text, parse_line(text)) for text in raw_lines(file))
                kept = b"".join(text.rstrip(b"\n") + b"\n" for text, line in steps
                                if line is not None and line["step"] < first_step)
            if kept != whole:
                replace_bytes(self.path, kept)

    def write(self, step: int, metrics: Line) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def saved(self, step: int, checkpoint: Path) -> None:
        pass

    def close(self) -> None:
        pass


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
