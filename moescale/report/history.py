"""A run read back from its directory, thinned by time so that long runs fit on a page."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moescale.config import Config, ConfigError, load_config
from moescale.files.reading import explain, open_regular
from moescale.record.figures import alerts, counts_of_all, numbers, rows_between_ranks
from moescale.record.metrics import FILE, raw_lines, read_lines

MAX_FRAMES = 200
MAX_CELLS = 2_000_000  # frames x layers x experts
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
    path = directory / FILE
    if not path.exists():
        raise ConfigError(f"{directory} holds no {FILE}: give the directory of a run, its run.dir")
    config = load_config(directory / "config.yaml", whole=True)
    try:
        with open_regular(path) as file:
            num_lines = sum(1 for _ in raw_lines(file))
            file.seek(0)
            return _history(directory, config, islice(read_lines(file), num_lines), num_lines)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {explain(error)}") from None


def _history(directory: Path, config: Config, lines: Iterator[dict[str, Any]], num_lines: int) -> History:
    """Thin the lines of a run. lines: at most num_lines, for a run that goes on writes more meanwhile."""
    layers = tuple(index for index, layer in enumerate(config.model.layers) if layer.channel_mixer == "moe")
    cells = max(1, len(layers) * config.moe.num_experts)
    num_frames = max(1, min(MAX_FRAMES, num_lines, MAX_CELLS // cells))
    loads, counts = np.zeros((num_frames, len(layers), config.moe.num_experts), np.float32), np.zeros(num_frames)
    frames, points = np.zeros(num_frames, np.int64), dict[str, list[tuple[int, float]]]()
    said: deque[tuple[int, str]] = deque(maxlen=MAX_ALERTS)
    last: dict[str, Any] = {}
    for number, line in enumerate(lines):
        step, frame = line["step"], number * num_frames // num_lines
        for key, value in numbers(line).items():
            points.setdefault(key, []).append((step, value))
        load = counts_of_all(line, layers, config.moe.num_experts)
        if load is not None:
            loads[frame] += load / np.maximum(load.mean(1, keepdims=True), 1e-9)
            counts[frame] += 1
        frames[frame] = step
        said += [(step, text) for text in alerts(line)]
        last = line
    if not last:
        raise ConfigError(f"{directory / FILE} holds no complete line yet: wait for the run's first logged "
                          "step")
    seen = counts > 0
    curves = {key: Curve(*(np.array(column) for column in zip(*pairs, strict=True))) for key, pairs in points.items()}
    return History(directory.resolve().name, directory, config, curves, layers, frames[seen],
                   loads[seen] / counts[seen][:, None, None], list(said), last["step"], numbers(last),
                   rows_between_ranks(last))

