"""Several runs side by side: the keys in which they differ, and how far each has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from moescale.config import ConfigError, differing_keys, written
from moescale.report.history import History, read_history

FIGURES = {  # a curve whose last value is shown: its title, how it is written
    "loss": ("loss", "{:.4f}"), "eval_loss": ("held-out loss", "{:.4f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"), "seconds": ("seconds", "{:,.0f}"),
}


def read_histories(directories: Iterable[Path]) -> tuple[list[History], list[str]]:
    """Read some runs. -> those that can be read, under names of their own, and why others cannot

    Raises ConfigError where none can be read.
    """
    runs, problems = [], []
    for directory in directories:
        try:
            runs.append(read_history(directory))
        except ConfigError as error:
            problems.append(str(error))
    if not runs:
        raise ConfigError(problems[0] if len(problems) == 1 else f"none of {len(problems)} can be read: {problems[0]}")
    names = Counter(run.name for run in runs)
    return [run if names[run.name] == 1 else replace(run, name=str(run.directory)) for run in runs], problems


def compare(runs: Sequence[History]) -> list[list[str]]:
    """Lay runs side by side. -> the titles of the columns, then a row for each run, its name first"""
    differing = {key: values for key, values in differing_keys(*(run.config for run in runs)).items()
                 if key != "run.dir"}
    figures = {key: value for key, value in FIGURES.items() if any(key in run.curves for run in runs)}
    rows = [["run", *differing, "step", *(title for title, _ in figures.values()), "alerts"]]
    for index, run in enumerate(runs):
        last = [form.format(run.curves[key].values[-1]) if key in run.curves else "-"
                for key, (_, form) in figures.items()]
        rows.append([run.name, *(written(values[index]) for values in differing.values()), f"{run.step:,}", *last,
                     str(len(run.alerts))])
    return rows
