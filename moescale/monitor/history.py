"""A run read back from its directory, thinned by time so that long runs fit on a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moescale.config import Config, ConfigError, load_config

MAX_FRAMES = 200
MAX_CELLS = 2_000_000  # frames x layers x experts
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

    curves: every figure that is one number, by its key. layers: the blocks that are mixtures. last: the last line.
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
    last: Mapping[str, Any]


def read_history(directory: Path) -> History:
    """Read a run directory. Raises ConfigError when it holds no run."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        raise ConfigError(f"{directory} holds no metrics.jsonl: give the directory of a run, its run.dir")
    config = load_config(directory / "config.yaml")
    with path.open(encoding="utf-8") as file:
        num_lines = sum(1 for _ in file)
    layers = tuple(index for index, layer in enumerate(config.model.layers) if layer.channel_mixer == "moe")
    cells = max(1, len(layers) * config.moe.num_experts)
    num_frames = max(1, min(MAX_FRAMES, num_lines, MAX_CELLS // cells))
    loads, counts = np.zeros((num_frames, len(layers), config.moe.num_experts), np.float32), np.zeros(num_frames)
    frames, points, alerts = np.zeros(num_frames, np.int64), dict[str, list[tuple[int, float]]](), []
    last: dict[str, Any] = {}
    for number, line in enumerate(islice(_lines(path), num_lines)):  # a run that goes on writes more meanwhile
        step, frame = line["step"], number * num_frames // num_lines
        for key, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(key, []).append((step, value))
        if layers and f"moe/layer_{layers[0]:02d}/tokens_per_expert" in line:
            load = np.array([line[f"moe/layer_{layer:02d}/tokens_per_expert"] for layer in layers], np.float32)
            loads[frame] += load / np.maximum(load.mean(1, keepdims=True), 1e-9)
            counts[frame] += 1
        frames[frame] = step
        alerts += [(step, text) for text in line.get("alerts", [])]
        last = line
    if not last:
        raise ConfigError(f"{path} holds no complete line yet: wait for the run's first logged step")
    seen = counts > 0
    curves = {key: Curve(*(np.array(column) for column in zip(*pairs, strict=True))) for key, pairs in points.items()}
    return History(directory.resolve().name, directory, config, curves, layers, frames[seen],
                   loads[seen] / counts[seen][:, None, None], alerts, last)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Each complete line; a run under way may be writing the last one."""
    with path.open(encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line
