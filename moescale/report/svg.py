"""Pictures as SVG: curves over steps, and maps of cells. Colours are classes that the page's style sheet defines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from moescale.errors import visible
from moescale.report.history import Curve

COLOURS, DASHES = 6, 4  # of runs
MOST_NAMED = 4  # runs whose figures stand above a chart by name
LINES = "\n\t"  # what may stand in a text of several lines
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 360, 170, 44, 20, 8, 8


def as_html(text: str, keep: str = "") -> str:
    """Make any text one that can stand in a page: markup, and what would turn or break the text, written out."""
    return escape(visible(text, keep))


def run_class(index: int) -> str:
    """Give the classes of a run's colour, and of its dashes where there are more runs than colours."""
    return f"run{index % COLOURS} dash{index // COLOURS % DASHES}"


def line_chart(title: str, curves: Sequence[tuple[str, int, Curve]], unit: str = "") -> str:
    """Draw curves over one axis of steps. curves: name, number of the run, curve. -> a figure"""
    drawn = [(name, number, curve.thinned()) for name, number, curve in curves if len(curve.steps)]
    if not drawn:
        return ""
    first, last = (pick(float(pick(curve.steps)) for *_, curve in drawn) for pick in (min, max))
    low, high = (pick(float(pick(curve.values)) for *_, curve in drawn) for pick in (min, max))
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    last = max(last, first + 1)
    x = _scale(first, last, LEFT, WIDTH - RIGHT)
    y = _scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = []
    for value in _ticks(low, high):
        at = round(float(y(value)), 1)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>'
                     f'<text x="{LEFT - 4}" y="{at + 3}" text-anchor="end">{_number(value)}</text>')
    for value, anchor in ((first, "start"), (last, "end")):
        parts.append(f'<text x="{float(x(value)):.0f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{value:,.0f}</text>')
    for _, number, curve in drawn:
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in zip(x(curve.steps), y(curve.values), strict=True))
        mark = f'<circle r="2.5" cx="{points.partition(",")[0]}" cy="{points.partition(",")[2]}"/>'
        parts.append(f'<g class="{run_class(number)}">'
                     + (f'<polyline points="{points}"/>' if len(curve.steps) > 1 else mark) + "</g>")
    latest = "; ".join(f"{name if len(drawn) > 1 else ''} {_number(float(curve.values[-1]))}".strip()
                       for name, _, curve in drawn)
    if len(drawn) > MOST_NAMED:
        ends = [float(curve.values[-1]) for *_, curve in drawn]
        latest = f"{_number(min(ends))} to {_number(max(ends))}"
    axis = json.dumps({"x": [first, last, LEFT, WIDTH - RIGHT], "y": [low, high, HEIGHT - BOTTOM, TOP]})
    return (f"<figure class=\"chart\" data-axis='{axis}'><figcaption>{as_html(title)} "
            f'<span class="reading">{as_html(latest)}{as_html(unit)}</span></figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{as_html(title)}">{"".join(parts)}'
            '<path class="cursor" d=""/></svg></figure>')


def load_classes(loads: np.ndarray) -> np.ndarray:
    """Sort loads over the mean into colours: 0 = next to none, 1 (a quarter or less) to 11 (four times or more)."""
    with np.errstate(divide="ignore"):
        colour = np.rint(6 + 2.5 * np.log2(np.maximum(loads, 1e-9)))
    return np.where(loads < 0.01, 0, np.clip(colour, 1, 11)).astype(int)


def share_classes(shares: np.ndarray) -> np.ndarray:
    """Sort shares of the largest into colours: 20 = none to 30 = the largest."""
    return 20 + np.rint(10 * shares / max(float(shares.max(initial=0)), 1e-9)).astype(int)


def cell_map(classes: np.ndarray, rows: Sequence[str], columns: tuple[str, str], *, label: str, name: str = "",
             readings: str = "") -> str:
    """Draw a map of cells. classes: [rows, columns] int, colours. rows: each one's name. columns: the outer two.

    name: by which the script finds it. readings: what it says of the cell pointed at. -> a block of HTML
    """
    height, width = classes.shape
    every = -(-height // 24)
    names = "".join(f"<span>{as_html(row) if index % every == 0 else ''}</span>" for index, row in enumerate(rows))
    pixels = min(480, max(15, 32 - 2 * height) * height)
    said = as_html(readings, LINES)
    return (f'<div class="map" data-map="{as_html(name)}" data-readings="{said}"><div class="rows">{names}'
            f'</div><svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" style="height:{pixels}px" '
            f'role="img" aria-label="{as_html(label)}">{cell_paths(classes)}</svg><div class="columns">'
            f"<span>{as_html(columns[0])}</span><span>{as_html(columns[1])}</span></div></div>")


def cell_paths(classes: np.ndarray) -> str:
    """Draw all cells of one colour as one path, neighbours in a row as one box; `report.js` does the same."""
    paths: dict[int, list[str]] = {}
    for row, line in enumerate(classes):
        edges = np.flatnonzero(np.diff(line, prepend=-1, append=-1))
        for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            paths.setdefault(int(line[begin]), []).append(f"M{begin} {row}h{end - begin}v1h{begin - end}z")
    return "".join(f'<path class="c{colour}" d="{"".join(boxes)}"/>' for colour, boxes in sorted(paths.items()))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[Any], np.ndarray]:
    """Make what maps values onto a stretch of the picture."""
    return lambda value: start + (np.asarray(value, dtype=float) - low) * (end - start) / (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, about four."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 5)
    return [float(index * step) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    if abs(value) >= 1000:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"
