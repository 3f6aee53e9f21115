"""`moescale convert`: what the options mean, and what is printed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

from moescale.checkpoint.readers import trying_again
from moescale.config import ConfigError
from moescale.convert.companions import padding_note
from moescale.convert.edits import placement
from moescale.convert.edits.experts import permute, reduce, replicate, upcycle
from moescale.convert.edits.loads import read_loads
from moescale.convert.formats import native
from moescale.convert.formats.hf import weights as hf
from moescale.convert.formats.hf.config import write_notes
from moescale.convert.inventory import describe, print_description, print_fingerprints
from moescale.convert.mapping.mapped import Layout, Opened
from moescale.convert.run import FORMATS, Change, Result, convert, open_source
from moescale.errors import visible
from moescale.files.reading import explain

Compare = Callable[..., str]
T = TypeVar("T")
DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
SHOWN = 4  # names of tensors that are left out


@dataclass(frozen=True)
class Options:
    """What the command line says beside source and destination; each change is None where it is not asked for."""

    to: str
    layout: Layout = field(default_factory=Layout)
    dtype: str | None = None
    upcycle: int | None = None
    top_k: int | None = None
    granularity: int = 1
    noise: float = 0.0
    experts: int | None = None
    drop_experts: int | None = None
    merge_experts: int | None = None
    place_experts: int | None = None
    load: Path | None = None


def inspect(source: Path, as_json: bool) -> None:
    """Print what a checkpoint holds. Raises ConfigError."""
    values = _with(source, describe)
    if as_json:
        print(json.dumps(values, indent=1))
    else:
        print_description(values)


def _with(source: Path, work: Callable[[Opened], T]) -> T:
    """Work with a checkpoint, with the next one of a run where the run removed it meanwhile. Raises ConfigError."""
    try:
        return trying_again(lambda: open_source(source), lambda opened: opened.path.exists(), work)
    except OSError as error:
        raise ConfigError(f"{error.filename or source}: {explain(error)}") from None


def run(source: Path, destination: Path, options: Options, compare: Compare | None) -> None:
    """Convert, and print what was done. compare: for --verify. Raises ConfigError."""
    if options.to not in FORMATS:
        raise ConfigError(f"--to {options.to} is no format: write one of {', '.join(FORMATS)}")
    if options.dtype not in DTYPES:
        raise ConfigError(f"--dtype {options.dtype}: write float32 or bfloat16")
    _with(source, lambda opened: _convert(source, opened, destination, options, compare))


def _convert(source: Path, opened: Opened, destination: Path, options: Options, compare: Compare | None) -> None:
    change, same = _change(source, opened, options)
    said: list[str] = []

    def check(before: Opened, after: Opened, found: Mapping[str, str]) -> None:
        if compare is not None:
            said.append(compare(before, after, found, same=same))

    started = time.perf_counter()
    result = convert(opened, destination, options.to, options.layout, DTYPES[options.dtype], change=change,
                     check=None if compare is None else check)
    seconds = time.perf_counter() - started
    _report(result)
    for line in said:
        print(line)
    notes = list(opened.notes)
    if options.to == hf.NAME:
        config = opened.config if change is None else change.config
        notes += [*write_notes(config), *filter(None, [padding_note(destination, config)])]
    for note in notes:
        print(f"note: {note}")
    print(f"{opened.format} {opened.path} -> {options.to} {destination}: {result.size_bytes:,} bytes "
          f"in {seconds:.1f} s ({result.size_bytes / seconds / 1e6:,.0f} MB/s)")
    if options.to == native.NAME and opened.format != native.NAME:
        print(f"train on: moescale train {destination}/config.yaml 'data.files=[texts/**/*.txt]'")


def _change(source: Path, opened: Opened, options: Options) -> tuple[Change | None, bool]:
    """Say what other model is asked for, if any, and whether its logits are the source's."""
    asked = [name for name in ("upcycle", "experts", "drop_experts", "merge_experts", "place_experts")
             if getattr(options, name) is not None]
    if len(asked) > 1:
        raise ConfigError("one change of the experts at a time: " + " or ".join(f"--{name.replace('_', '-')}"
                                                                               for name in asked))
    if options.noise and asked not in (["upcycle"], ["experts"]):
        raise ConfigError("--noise is for --upcycle and --experts")
    if (options.granularity != 1 or options.top_k is not None) and asked != ["upcycle"]:
        raise ConfigError("--granularity and --top-k are for --upcycle")
    if options.upcycle is not None:
        changed = upcycle(opened, options.upcycle, options.top_k, options.granularity, options.noise)
        return changed, options.noise == 0
    if options.experts is not None:
        return replicate(opened, options.experts, options.noise), options.noise == 0
    if not asked:
        return None, True
    loads = read_loads(options.load or source, opened.config)
    if options.place_experts is not None:
        placed = placement.place(loads, opened.config, options.place_experts)
        _print_placement(placed)
        return permute(opened, placed.orders, {placement.FILE: placed.to_json()}), True
    number = options.merge_experts if options.drop_experts is None else options.drop_experts
    assert number is not None
    return reduce(opened, loads, number, merge=options.drop_experts is None), False


def _report(result: Result) -> None:
    print_fingerprints(result.fingerprints)
    reasons: dict[str, list[str]] = {}
    for name, why in result.left_out.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        print(visible(f"left out, {why}: {', '.join(names[:SHOWN])}{more}"))


def _print_placement(placed: placement.Placement) -> None:
    """The busiest rank's load over the mean, layer by layer; 1 is as good as can be."""
    table = Table("layer", "busiest rank before", "after", title="load of the busiest rank over the mean")
    for layer in placed.orders:
        before, after = placed.before[layer], placed.after[layer]
        mean = sum(before) / len(before)
        table.add_row(str(layer), *(f"{max(loads) / mean:.3f}" if mean else "-" for loads in (before, after)))
    Console().print(table)
