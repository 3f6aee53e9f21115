"""What a run measured: how many rows each expert had."""

from __future__ import annotations

import json
from pathlib import Path

from moescale.config import Config, ConfigError

METRICS = "metrics.jsonl"
LAST = 100  # logged steps that count


def read_loads(path: Path, config: Config) -> dict[int, list[int]]:
    """Add up the loads of the last logged steps. path: a run directory, or a checkpoint in one.

    -> rows of each expert, by layer. Raises ConfigError.
    """
    places = (place / METRICS for place in (path, *path.absolute().parents[:2]))
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ConfigError(f"{path} has no {METRICS} with loads of experts: give the directory of a run")
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # cut off in the middle
    loads: dict[int, list[int]] = {}
    for index, layer in enumerate(config.model.layers):
        if layer.channel_mixer != "moe":
            continue
        key = f"moe/layer_{index:02d}/tokens_per_expert"
        counts = [line[key] for line in lines if isinstance(line, dict) and key in line][-LAST:]
        if not counts or any(len(row) != config.moe.num_experts for row in counts):
            raise ConfigError(f"{file} has no loads of the {config.moe.num_experts} experts of layer {index}")
        loads[index] = [sum(column) for column in zip(*counts, strict=True)]
    return loads
