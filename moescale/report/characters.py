"""A run in characters: `moescale report RUN --terminal`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moescale.errors import visible
from moescale.record.figures import of_all
from moescale.report.history import History

BLOCKS = "▁▂▃▄▅▆▇█"
BOUNDS = (0.25, 0.5, 0.75, 1.35, 2, 3, 4)  # of the load over the mean, between one block and the next
NONE = "x"
TREND = {
    "loss": "loss", of_all("max_load"): "busiest expert", of_all("dropped_share"): "share dropped",
    of_all("entropy"): "router entropy", "tokens_per_second": "tokens/s",
}


def curve(values: Sequence[float], width: int = 40) -> str:
    """Draw values as blocks of eight heights, at most `width` of them."""
    picked = [values[index * len(values) // width] for index in range(width)] if len(values) > width else values
    low, high = min(picked), max(picked)
    return "".join(BLOCKS[round(7 * (value - low) / ((high - low) or 1))] for value in picked)


def furthest(loads: np.ndarray, count: int) -> list[tuple[int, int]]:
    """List the experts furthest from the mean. loads: [layers, experts]. -> row and column of each, the worst first"""
    order = np.abs(np.log2(np.maximum(loads, 1e-3))).argsort(axis=None, kind="stable")[::-1][:count]
    return [(int(row), int(column)) for row, column in zip(*np.unravel_index(order, loads.shape), strict=True)]


def draw(run: History, width: int) -> str:
    """Draw the load of each layer and expert, the five worst, the trend. width: of the terminal, in characters"""
    figures = [form.format(run.last[key]) for key, form in (
        ("loss", "loss {:.4f}"), ("tokens_per_second", "{:,.0f} tokens/s")) if key in run.last]
    lines = [f"{visible(run.name)}, step {run.step:,}" + (": " if figures else "") + ", ".join(figures)]
    if len(run.frames):
        loads = run.loads[-1]
        lines += ["", "Load of each expert over its layer's mean, a layer a line "
                  f"({NONE} none, {BLOCKS[0]} below {BOUNDS[0]}, {BLOCKS[3]} even, {BLOCKS[-1]} {BOUNDS[-1]} and more)"]
        lines += [f"{layer:>4} {_cells(line, width - 5)}" for layer, line in zip(run.layers, loads, strict=True)]
        lines += ["", "Furthest from the mean: " + ", ".join(
            f"L{run.layers[row]}E{column} {loads[row, column]:.2f}x" for row, column in furthest(loads, 5))]
    lines += ["", "Trend"]
    for key, name in TREND.items():
        if key in run.curves:
            values = run.curves[key].values
            lines.append(f"{name:>14} {values[0]:>8,.4g} {curve(values.tolist())} {values[-1]:,.4g}")
    alerts = [f"step {step:,}: {visible(text)}" for step, text in run.alerts[-5:]]
    lines += ["", *(alerts or ["No alert."])]
    return "\n".join(lines)


def draw_table(rows: Sequence[Sequence[str]]) -> str:
    """Draw rows of cells, the first column to the left and the others to the right."""
    shown = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) if column else cell.ljust(width)
                                for column, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in shown)


def _cells(loads: np.ndarray, width: int) -> str:
    """One character an expert; of several experts to a character the one furthest from the mean."""
    groups = np.array_split(loads, min(len(loads), max(1, width)))
    shown = [group[np.abs(np.log2(np.maximum(group, 1e-3))).argmax()] for group in groups]
    return "".join(NONE if load < 0.01 else BLOCKS[int(np.searchsorted(BOUNDS, load, side="right"))] for load in shown)
