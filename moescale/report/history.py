"""A run read back from its directory, thinned by time so that long runs fit on a page."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moescale.config import Config, ConfigError, load_config
from moescale.files.reading import explain, open_regular

MAX_FRAMES = 200
MAX_CELLS = 2_000_000  # frames x layers x experts
LONGEST_LINE = 64_000_000  # bytes
LARGEST_STEP, LARGEST_FIGURE = 1 << 53, 1e30  # beyond that is damage
MAX_ALERTS = 1000
MAX_POINTS = 180  # stretches of a curve, each with its lowest and its highest value


@dataclass(frozen=True)
class Curve:
    """One figure over time: steps [points] int64, values [points] float64."""

    steps: np.ndarray
    values: np.ndarray

    def thinned(self) -> Curve:
        """Keep the lowest and the highest value of each of some stretches, so that no spike is lost."""
        if len(self.steps) <= 2 * MAX_POINTS:
            return self
        keep: set[int] = {0, len(self.steps) - 1}
        for part in np.array_split(np.arange(len(self.steps)), MAX_POINTS):
            keep |= {int(part[self.values[part].argmin()]), int(part[self.values[part].argmax()])}
        chosen = np.array(sorted(keep))
        return Curve(self.steps[chosen], self.values[chosen])


@dataclass(frozen=True)
class History:
    """What a run has logged.

    curves: every figure that is one number, by its key. layers: the blocks that are mixtures. step: of the last line.
    last: its figures that are numbers. rows: [ranks, ranks], what it says of rows between ranks; empty where it does
    not.
    loads: [frames, layers, experts] float32, rows over the layer's mean, each frame a mean over some logged steps, of
    which `frames` has the last. alerts: step and text.
    """

    name: str
    directory: Path
    config: Config
    curves: Mapping[str, Curve]
    layers: tuple[int, ...]
    frames: np.ndarray
    loads: np.ndarray
    alerts: Sequence[tuple[int, str]]
    step: int
    last: Mapping[str, float]
    rows: np.ndarray


def read_history(directory: Path) -> History:
    """Read a run directory, without what in its lines is no figure. Raises ConfigError when it holds no run."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        raise ConfigError(f"{directory} holds no metrics.jsonl: give the directory of a run, its run.dir")
    config = load_config(directory / "config.yaml", whole=True)
    try:
        with open_regular(path) as file:
            num_lines = sum(1 for _ in _texts(file))
            file.seek(0)
            return _history(directory, config, islice(_lines(file), num_lines), num_lines)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {explain(error)}") from None


def _history(directory: Path, config: Config, lines: Iterator[dict[str, Any]], num_lines: int) -> History:
    """Thin the lines of a run. lines: at most num_lines, for a run that goes on writes more meanwhile."""
    layers = tuple(index for index, layer in enumerate(config.model.layers) if layer.channel_mixer == "moe")
    cells = max(1, len(layers) * config.moe.num_experts)
    num_frames = max(1, min(MAX_FRAMES, num_lines, MAX_CELLS // cells))
    loads, counts = np.zeros((num_frames, len(layers), config.moe.num_experts), np.float32), np.zeros(num_frames)
    frames, points = np.zeros(num_frames, np.int64), dict[str, list[tuple[int, float]]]()
    alerts: deque[tuple[int, str]] = deque(maxlen=MAX_ALERTS)
    last: dict[str, Any] = {}
    for number, line in enumerate(lines):
        step, frame = line["step"], number * num_frames // num_lines
        for key, value in _figures(line).items():
            points.setdefault(key, []).append((step, value))
        load = _load(line, layers, config.moe.num_experts)
        if load is not None:
            loads[frame] += load / np.maximum(load.mean(1, keepdims=True), 1e-9)
            counts[frame] += 1
        frames[frame] = step
        alerts += [(step, text) for text in _alerts(line)]
        last = line
    if not last:
        raise ConfigError(f"{directory / 'metrics.jsonl'} holds no complete line yet: wait for the run's first logged "
                          "step")
    seen = counts > 0
    curves = {key: Curve(*(np.array(column) for column in zip(*pairs, strict=True))) for key, pairs in points.items()}
    return History(directory.resolve().name, directory, config, curves, layers, frames[seen],
                   loads[seen] / counts[seen][:, None, None], list(alerts), last["step"], _figures(last),
                   _matrix(last.get("moe/rows_between_ranks")))


def _texts(file: BinaryIO) -> Iterator[bytes]:
    """Each line of a file, cut where it is too long to be one."""
    while text := file.readline(LONGEST_LINE):
        yield text


def _lines(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Each complete line that has a step; a run under way may be writing the last one."""
    for text in _texts(file):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # also for bytes that are no UTF-8
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < LARGEST_STEP:
            yield line


def _is_figure(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST_FIGURE < value < LARGEST_FIGURE


def _figures(line: Mapping[str, Any]) -> dict[str, float]:
    """Take what is one finite number of a size that can be drawn."""
    return {key: float(value) for key, value in line.items() if _is_figure(value)}


def _load(line: Mapping[str, Any], layers: Sequence[int], num_experts: int) -> np.ndarray | None:
    """Take the rows of each expert, [layers, experts] float32, where the line has those of all layers."""
    rows = [line.get(f"moe/layer_{layer:02d}/tokens_per_expert") for layer in layers]
    for row in rows:
        if not isinstance(row, list) or len(row) != num_experts or not all(_is_figure(x) and x >= 0 for x in row):
            return None
    return np.array(rows, np.float32) if rows else None


def _alerts(line: Mapping[str, Any]) -> list[str]:
    alerts = line.get("alerts")
    return [text for text in alerts if isinstance(text, str)] if isinstance(alerts, list) else []


def _matrix(rows: Any) -> np.ndarray:
    """Take a square of numbers from 0; [0, 0] where it is none."""
    square = isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == len(rows) and all(_is_figure(x) and x >= 0 for x in row) for row in rows)
    return np.array(rows, float).reshape(len(rows), -1) if square and rows else np.zeros((0, 0))
