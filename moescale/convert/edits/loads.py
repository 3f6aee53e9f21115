"""What a run measured: how many rows each expert had."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from moescale.config import Config, ConfigError
from moescale.files.reading import explain, open_regular
from moescale.record.figures import counts_of
from moescale.record.metrics import FILE, read_lines

LAST = 100  # logged steps that count


def read_loads(path: Path, config: Config) -> dict[int, list[int]]:
    """Add up the loads of the last logged steps. path: a run directory, or a checkpoint in one.

    Returns rows of each expert, by layer. Raises ConfigError.
    """
    files = (folder / FILE for folder in (path, *path.absolute().parents[:2]))
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ConfigError(f"{path} has no {FILE} with loads of experts: give the directory of a run")
    counts: dict[int, deque[list[int]]] = {index: deque(maxlen=LAST) for index, layer in enumerate(config.model.layers)
                                           if layer.channel_mixer == "moe"}
    try:
        with open_regular(file) as lines:
            for line in read_lines(lines):
                for index, rows in counts.items():
                    row = counts_of(line, index, config.moe.num_experts)
                    if row is not None:
                        rows.append(row)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {explain(error)}") from None
    for index, rows in counts.items():
        if not rows:
            raise ConfigError(f"{file} has no loads of the {config.moe.num_experts} experts of layer {index}")
    return {index: [sum(column) for column in zip(*rows, strict=True)] for index, rows in counts.items()}

