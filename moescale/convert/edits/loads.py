"""What a run measured: how many rows each expert had."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from moescale.config import Config, ConfigError
from moescale.files.reading import explain, open_regular

METRICS = "metrics.jsonl"
LAST = 100  # logged steps that count
LONGEST_LINE = 64_000_000  # bytes
LARGEST_COUNT = 1 << 53


def read_loads(path: Path, config: Config) -> dict[int, list[int]]:
    """Add up the loads of the last logged steps. path: a run directory, or a checkpoint in one.

    -> rows of each expert, by layer. Raises ConfigError.
    """
    places = (place / METRICS for place in (path, *path.absolute().parents[:2]))
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ConfigError(f"{path} has no {METRICS} with loads of experts: give the directory of a run")
    counts: dict[int, deque[list[int]]] = {index: deque(maxlen=LAST) for index, layer in enumerate(config.model.layers)
                                           if layer.channel_mixer == "moe"}
    try:
        with open_regular(file) as lines:
            while text := lines.readline(LONGEST_LINE):
                for index, row in _rows(text, counts, config.moe.num_experts):
                    counts[index].append(row)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {explain(error)}") from None
    for index, rows in counts.items():
        if not rows:
            raise ConfigError(f"{file} has no loads of the {config.moe.num_experts} experts of layer {index}")
    return {index: [sum(column) for column in zip(*rows, strict=True)] for index, rows in counts.items()}


def _rows(text: bytes, layers: Iterable[int], num_experts: int) -> Iterator[tuple[int, list[int]]]:
    """Read one line; nothing where it was cut off or is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return
    for index in layers:
        row = line.get(f"moe/layer_{index:02d}/tokens_per_expert") if isinstance(line, dict) else None
        if isinstance(row, list) and len(row) == num_experts and all(
                type(count) in (int, float) and 0 <= count < LARGEST_COUNT for count in row):
            yield index, row
