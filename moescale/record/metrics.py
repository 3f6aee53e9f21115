"""Where figures go: one line of JSON a logging step, and whatever other sink is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moescale.files.reading import open_regular
from moescale.files.writing import replace_bytes

Metrics = Mapping[str, Any]
MEASURED = ("tokens_per_second", "time", "seconds", "memory_bytes", "mfu")  # which no two runs have alike


class Sink(Protocol):
    def write(self, step: int, metrics: Metrics) -> None:
        """Take the figures of one step: numbers, and lists of numbers."""

    def saved(self, step: int, checkpoint: Path) -> None:
        """A checkpoint is on disk."""

    def close(self) -> None:
        """Nothing follows."""


class JsonLines:
    """`metrics.jsonl`: one object a line. Lines of steps that a resumed run does again are dropped first."""

    def __init__(self, path: Path, first_step: int) -> None:
        """first_step: the step that comes next; lines from it on belong to a run that was cut off."""
        self.path = path
        if path.exists():
            with open_regular(path) as file:
                lines = file.read().split(b"\n")
            kept = b"".join(line + b"\n" for line in lines if _step(line) < first_step)
            if kept != b"\n".join(lines):
                replace_bytes(path, kept)

    def write(self, step: int, metrics: Metrics) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def saved(self, step: int, checkpoint: Path) -> None:
        pass

    def close(self) -> None:
        pass


def _step(line: bytes) -> float:
    """The step of a line; infinity for one that was cut off in the middle, or is not text at all."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return float("inf")
