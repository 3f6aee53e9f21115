"""`moescale convert`: what the options mean, and what is printed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moescale.checkpoint.convert import FORMATS, convert, open_source
from moescale.checkpoint.inspect import describe, print_description, print_fingerprints
from moescale.checkpoint.mapped import Layout, Opened
from moescale.config import ConfigError

Compare = Callable[[Opened, Opened, Mapping[str, str]], str]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What the command line says beside source and destination."""

    to: str | None = None
    layout: Layout = Layout()
    dtype: str | None = None


def inspect(source: Path, as_json: bool) -> None:
    """Print what a checkpoint holds. Raises ConfigError."""
    values = describe(open_source(source))
    if as_json:
        print(json.dumps(values, indent=1))
    else:
        print_description(values)


def run(source: Path, destination: Path, options: Options, compare: Compare | None) -> None:
    """Convert, and print what was done. compare: for --verify. Raises ConfigError."""
    opened = open_source(source)
    if options.to not in FORMATS:
        raise ConfigError(f"--to {options.to} is no format: write one of {', '.join(FORMATS)}")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise ConfigError(f"--dtype {options.dtype}: write float32 or bfloat16")
    said: list[str] = []

    def check(before: Opened, after: Opened, found: Mapping[str, str]) -> None:
        assert compare is not None
        said.append(compare(before, after, found))

    started = time.perf_counter()
    result = convert(opened, destination, options.to, options.layout,
                     None if options.dtype is None else DTYPES[options.dtype],
                     check=None if compare is None else check)
    seconds = time.perf_counter() - started
    print_fingerprints(dict(result.fingerprints))
    reasons: dict[str, list[str]] = {}
    for name, why in result.left_out.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        print(f"left out, {why}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}")
    for line in said:
        print(line)
    print(f"{opened.format} {opened.path} -> {options.to} {destination}: {result.size_bytes:,} bytes "
          f"in {seconds:.1f} s ({result.size_bytes / seconds / 1e6:,.0f} MB/s)")
