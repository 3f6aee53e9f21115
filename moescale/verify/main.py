"""The command `moescale verify`, from its options to its table."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from rich.console import Console

from moescale.config import Config, ConfigError
from moescale.verify.candidates import Layout, layouts_of, parse_layouts, sample_layouts
from moescale.verify.display import describe, estimate_seconds, follow, minutes, print_table, write_json
from moescale.verify.run import prepare, try_layouts
from moescale.verify.shrink import shrink


def verify(
    config: Config, *, layouts: str | None = None, ranks: int | None = None, seed: int | None = None,
    json: Path | None = None,
) -> bool:
    """Try layouts and print what came of them. -> whether all train as one process does

    layouts: e.g. "tp2 ep4, pp2". ranks: every layout of so many. Neither: a sample. seed: none = the date.
    """
    if layouts is not None and ranks is not None:
        raise ConfigError("--layouts names layouts and --ranks asks for all of them: give one of the two")
    if config.parallel.over_budget == "drop":
        raise ConfigError("parallel.over_budget=drop leaves out other rows in every layout, so that there is "
                          "nothing to prove: add parallel.over_budget=passes")
    if json is not None and not json.parent.is_dir():
        raise ConfigError(f"--json {json}: there is no folder {json.parent}")
    seed = int(datetime.date.today().strftime("%Y%m%d")) if seed is None else seed
    chosen = _choose(config, layouts, ranks, seed)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)  # a file has no width of its own
    cores = os.cpu_count() or 1
    small = shrink(config, chosen)
    seconds = estimate_seconds(chosen, small.model.num_layers, cores)
    what = "1 layout" if len(chosen) == 1 else f"{len(chosen)} layouts"
    console.print(f"{what} of up to {max(each.ranks for each in chosen)} ranks on {cores} cores: about "
                  f"{minutes(seconds)}; seed {seed}", markup=False)
    slowest = max(estimate_seconds([layout], small.model.num_layers, cores) for layout in chosen)
    console.print(f"shrunk to {describe(small)}", markup=False)
    proof = prepare(small, seed)
    rows = follow(try_layouts(proof, chosen, 30 + 10 * slowest), len(chosen), seconds, console)
    print_table(rows, console)
    if json is not None:
        write_json(json, rows, small, seed)
    return not any(row.diagnosis for row in rows)


def _choose(config: Config, layouts: str | None, ranks: int | None, seed: int) -> list[Layout]:
    if layouts is not None:
        return parse_layouts(layouts, config)
    if ranks is not None:
        return layouts_of(config, ranks)
    return sample_layouts(config, seed)
