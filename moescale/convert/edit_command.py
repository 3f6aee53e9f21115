"""`moescale edit`: which change of the experts is asked for, and what is printed of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moescale.config import ConfigError
from moescale.convert.command import Compare, refuse_format, with_source, write
from moescale.convert.edits import rank_balance
from moescale.convert.edits.experts import permute, reduce, replicate, upcycle
from moescale.convert.edits.loads import read_loads
from moescale.convert.mapping.mapped import FileLayout, Opened
from moescale.convert.run import Change

CHANGES = ("upcycle", "experts", "drop_experts", "merge_experts", "place_experts")


@dataclass(frozen=True)
class Options:
    """The change that is asked for, one of CHANGES, and what it may need; None where it is not asked for."""

    upcycle: int | None = None
    granularity: int = 1
    top_k: int | None = None
    experts: int | None = None
    noise: float = 0.0
    drop_experts: int | None = None
    merge_experts: int | None = None
    place_experts: int | None = None
    load: Path | None = None


def run(source: Path, destination: Path, to: str | None, options: Options, compare: Compare | None) -> None:
    """Write a checkpoint with other experts, and print what was done.

    to: a format; None is the source's. compare: for --verify. Raises ConfigError.
    """
    _refuse(options)
    if to is not None:
        refuse_format(to)

    def edit(opened: Opened) -> None:
        style = opened.layout.style if to in (None, opened.format) else None
        change = _change(source, opened, options)
        write(opened, destination, to or opened.format, FileLayout(style=style), None, compare, change)

    with_source(source, edit)


def _refuse(options: Options) -> None:
    """Refuse options that do not belong together. Raises ConfigError."""
    asked = [name for name in CHANGES if getattr(options, name) is not None]
    if len(asked) != 1:
        names = " or ".join(f"--{name.replace('_', '-')}" for name in asked or CHANGES)
        raise ConfigError(f"write one change of the experts: {names}")
    if options.noise and asked[0] not in ("upcycle", "experts"):
        raise ConfigError("--noise is for --upcycle and --experts")
    if (options.granularity != 1 or options.top_k is not None) and asked[0] != "upcycle":
        raise ConfigError("--granularity and --top-k are for --upcycle")
    if options.load is not None and asked[0] in ("upcycle", "experts"):
        raise ConfigError("--load is for --drop-experts, --merge-experts and --place-experts")


def _change(source: Path, opened: Opened, options: Options) -> Change:
    """Work out the model that is asked for. Raises ConfigError."""
    if options.upcycle is not None:
        return upcycle(opened, options.upcycle, options.top_k, options.granularity, options.noise)
    if options.experts is not None:
        return replicate(opened, options.experts, options.noise)
    loads = read_loads(options.load or source, opened.config)
    if options.drop_experts is not None:
        return reduce(opened, loads, options.drop_experts, merge=False)
    if options.merge_experts is not None:
        return reduce(opened, loads, options.merge_experts, merge=True)
    assert options.place_experts is not None
    placed = rank_balance.balance_ranks(loads, opened.config, options.place_experts)
    _print_placement(placed)
    return permute(opened, placed.orders, {rank_balance.FILE: placed.to_json()})


def _print_placement(placed: rank_balance.RankBalance) -> None:
    """The busiest rank's load over the mean, layer by layer; 1 is as good as can be."""
    table = Table("layer", "busiest rank before", "after", title="load of the busiest rank over the mean")
    for layer in placed.orders:
        before, after = placed.before[layer], placed.after[layer]
        mean = sum(before) / len(before)
        table.add_row(str(layer), *(f"{max(loads) / mean:.3f}" if mean else "-" for loads in (before, after)))
    Console().print(table)
