"""`moescale convert`: what the options mean, and what is printed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from moescale.checkpoint.readers import trying_again
from moescale.config import ConfigError
from moescale.convert.companions import padding_note
from moescale.convert.formats import native
from moescale.convert.formats.hf import weights as hf
from moescale.convert.formats.hf.config import write_notes
from moescale.convert.inventory import describe, print_description, print_fingerprints
from moescale.convert.mapping.mapped import FileLayout, Opened
from moescale.convert.run import FORMATS, Change, Result, convert, open_source
from moescale.errors import visible
from moescale.files.reading import explain

Compare = Callable[..., str]
T = TypeVar("T")
DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
SHOWN = 4  # names of tensors that are left out


def inspect(source: Path, as_json: bool) -> None:
    """Print what a checkpoint holds. Raises ConfigError."""
    values = with_source(source, describe)
    if as_json:
        print(json.dumps(values, indent=1))
    else:
        print_description(values)


def with_source(source: Path, work: Callable[[Opened], T]) -> T:
    """Work with a checkpoint, with the next one of a run where the run removed it meanwhile. Raises ConfigError."""
    try:
        return trying_again(lambda: open_source(source), lambda opened: opened.path.exists(), work)
    except OSError as error:
        raise ConfigError(f"{error.filename or source}: {explain(error)}") from None


def run(
    source: Path, destination: Path, to: str, layout: FileLayout, dtype: str | None, compare: Compare | None
) -> None:
    """Convert, and print what was done. compare: for --verify. Raises ConfigError."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: write float32 or bfloat16")
    refuse_format(to)
    with_source(source, lambda opened: write(opened, destination, to, layout, DTYPES[dtype], compare))


def refuse_format(to: str) -> None:
    """Refuse a format that there is not. Raises ConfigError."""
    if to not in FORMATS:
        raise ConfigError(f"--to {to} is no format: write one of {', '.join(FORMATS)}")


def write(
    opened: Opened, destination: Path, to: str, layout: FileLayout, dtype: torch.dtype | None, compare: Compare | None,
    change: Change | None = None,
) -> None:
    """Write a checkpoint, changed or as it is, and print what was done. Raises ConfigError."""
    said: list[str] = []

    def check(before: Opened, after: Opened, found: Mapping[str, str]) -> None:
        if compare is not None:
            said.append(compare(before, after, found, same=change is None or change.keeps_logits))

    started = time.perf_counter()
    result = convert(opened, destination, to, layout, dtype, change=change, check=None if compare is None else check)
    seconds = time.perf_counter() - started
    _report(result)
    for line in said:
        print(line)
    notes = list(opened.notes)
    if to == hf.NAME:
        config = opened.config if change is None else change.config
        notes += [*write_notes(config), *filter(None, [padding_note(destination, config)])]
    for note in notes:
        print(f"note: {note}")
    print(f"{opened.format} {opened.path} -> {to} {destination}: {result.size_bytes:,} bytes "
          f"in {seconds:.1f} s ({result.size_bytes / seconds / 1e6:,.0f} MB/s)")
    if to == native.NAME and opened.format != native.NAME:
        print(f"train on: moescale train {destination}/config.yaml 'data.files=[texts/**/*.txt]'")


def _report(result: Result) -> None:
    print_fingerprints(result.fingerprints)
    reasons: dict[str, list[str]] = {}
    for name, why in result.left_out.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        others = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        print(visible(f"left out, {why}: {', '.join(names[:SHOWN])}{others}"))
