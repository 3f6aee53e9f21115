"""What tests know of the figures of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moescale.record.figures import figure

MEASURED = ("tokens_per_second", "time", "seconds", "memory_bytes", "mfu")  # which no two runs have alike


def check_figures(line: Mapping[str, Any]) -> None:
    """Hold each key and the shape of its value to the table of figures."""
    for key, value in line.items():
        depth = 0
        while isinstance(value, list):
            value, depth = value[0] if value else 0, depth + 1
        known = figure(key)
        assert depth == len(known.shape), f"{key} is {known.shape}"
        assert isinstance(value, str if known.shape == ("texts",) else int | float), key
