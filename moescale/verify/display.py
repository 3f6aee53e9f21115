"""Displays a proof: an estimate, a progress bar, a table with a row per layout; and writes the same as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from moescale.config import Config, any_of
from moescale.verify.candidates import Layout
from moescale.verify.compare import TOLERANCES, Deviation, worst, worst_scale
from moescale.verify.run import LayoutResult


def estimate_seconds(layouts: Iterable[Layout], num_layers: int, cores: int) -> float:
    """Guess what the layouts take. Measured: on each rank a second, and a second for four layers, of a core."""
    return sum(1 + (1 + num_layers / 4) * max(1, layout.ranks / cores) for layout in layouts)


def describe(config: Config) -> str:
    """Say in a line what the shrunk run is."""
    model, moe, mixers = config.model, config.moe, [layer.mixer for layer in config.layers]
    sizes = sorted({mixer.summary() for mixer in mixers})
    parts = [f"{model.num_layers} layers", f"d_model {model.d_model}", any_of(sizes)]
    if config.num_moe_layers:
        parts.append(f"{moe.num_experts} experts, {moe.router} top-{moe.top_k}")
    windows = [mixer.seen for mixer in mixers if mixer.seen]
    if windows:
        some = f" in {len(windows)} layers" if len(windows) < len(mixers) else ""
        parts.append(f"window {any_of(sorted(set(windows)))}{some}")
    return f"{', '.join(parts)}; {config.data.global_batch} sequences of {config.data.seq_len} tokens"


def follow(rows: Iterator[LayoutResult], count: int, seconds: float, console: Console) -> list[LayoutResult]:
    """Show a bar while the rows come in, or a line for each where there is no terminal. seconds: the estimate"""
    done: list[LayoutResult] = []
    progress = Progress(
        MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.description}"),
        console=console, transient=True, disable=not console.is_terminal,
        auto_refresh=False,  # a thread that draws, and ranks that are forked meanwhile, would wait for each other
    )
    with progress:
        task = progress.add_task("", total=count, left=f"about {minutes(seconds)} left")
        progress.refresh()
        for row in rows:
            done.append(row)
            left = sum(each.seconds for each in done) / len(done) * (count - len(done))
            verdict = "FAILS" if row.diagnosis else "ok"
            progress.update(task, completed=len(done), left=f"about {minutes(left)} left",
                            description=f"{row.layout} {verdict}")
            progress.refresh()
            if not console.is_terminal:
                console.print(f"{len(done)}/{count} {row.layout}: {verdict}, {row.seconds:.1f} s", markup=False)
    return done


def print_table(rows: Sequence[LayoutResult], console: Console) -> None:
    """Print a row for each layout, then a line for each that fails."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in ("layout", "schedule", *TOLERANCES, "worst of", "scale", "counts", "s", ""):
        table.add_column(heading, justify="right" if heading == "s" else "left", overflow="fold")
    for row in rows:
        table.add_row(
            str(row.layout), ", ".join(row.schedules) or "-", *(_worst(row, compute)[0] for compute in TOLERANCES),
            _worst(row)[1], _scale(row), _counts(row), f"{row.seconds:.1f}",
            "[red]FAILS[/red]" if row.diagnosis else "[green]ok[/green]",
        )
    console.print(table)
    for row in rows:
        if row.diagnosis:
            console.print(f"{row.layout} FAILS: {row.diagnosis}", markup=False)
    failed = sum(bool(row.diagnosis) for row in rows)
    limits = ", ".join(f"{tolerance:.0e} in {compute}" for compute, tolerance in TOLERANCES.items())
    console.print(f"{len(rows) - failed} of {len(rows)} layouts train as one process does, within {limits}")


def write_json(path: Path, rows: Sequence[LayoutResult], config: Config, seed: int) -> None:
    """Write everything that was measured. config: the shrunk run"""
    path.write_text(json.dumps({
        "seed": seed, "tolerances": TOLERANCES, "config": config.model_dump(mode="json"),
        "layouts": [_plain(row) for row in rows],
    }, indent=1) + "\n", encoding="utf-8")


def _plain(row: LayoutResult) -> dict[str, Any]:
    cases = [
        {"micro_batches": passes, "compute": compute, "figures": [
            {"quantity": each.quantity, "of": each.of, "error": _finite(each.error), "scale": _finite(each.scale)}
            for each in figures
        ]}
        for (passes, compute), figures in row.figures.items()
    ]
    return {"layout": str(row.layout), "degrees": row.layout.degrees, "ranks": row.layout.ranks,
            "schedules": row.schedules, "seconds": round(row.seconds, 2), "ok": not row.diagnosis,
            "diagnosis": row.diagnosis, "error": row.error, "cases": cases}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no infinity


def _figures(row: LayoutResult, compute: str | None = None) -> list[Deviation]:
    return [each for (_, of), figures in row.figures.items() if compute in (None, of) for each in figures]


def _worst(row: LayoutResult, compute: str | None = None) -> tuple[str, str]:
    """Find the largest error. -> the error, and the quantity it belongs to"""
    figures = [(worst(each, TOLERANCES[of]), TOLERANCES[of]) for (_, of), each in row.figures.items()
               if compute in (None, of)]
    if not figures:
        return "-", "-"
    figure, _ = max(figures, key=lambda pair: pair[0].error / pair[1])
    return f"{figure.error:.1e}", str(figure)


def _scale(row: LayoutResult) -> str:
    if not row.figures:
        return "-"
    figure = worst_scale(_figures(row))
    return f"{figure.scale:.3f}" + (f" {figure.of}" if abs(figure.scale - 1) >= 5e-4 else "")


def _counts(row: LayoutResult) -> str:
    counts = [each for each in _figures(row) if each.quantity in ("assignments", "tokens per expert", "dropped")]
    if not row.figures:
        return "-"
    return "equal" if all(each.error == 0 for each in counts) else "differ"


def minutes(seconds: float) -> str:
    """Write a duration as a person reads it."""
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60}:{whole % 60:02d} min"
