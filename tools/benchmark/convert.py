"""Memory and speed of a conversion, beside `cp` of the same files on the same disk.

    python tools/benchmark/convert.py FOLDER [--gigabytes 10] [--to hf] [--dtype bfloat16]

Writes a synthetic Mixtral checkpoint into FOLDER, copies it with `cp -r` and then converts it, each ended by a sync and
begun without a page of the source in memory; prints seconds, bytes a second, and the largest memory of the converting
process. FOLDER needs room for three times the checkpoint; all is removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from moescale.checkpoint.strided_view import Stored
from moescale.config import Config, parse_config
from moescale.convert.containers import Sizes
from moescale.convert.formats.hf.weights import create, plan
from moescale.convert.formats.native import native_weights
from moescale.convert.mapping.mapped import FileLayout, Opened
from moescale.convert.run import convert, open_source

MODEL = {"vocab_size": 32000, "d_model": 4096}
ATTENTION = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "rope_theta": 1e6}
MOE = {"num_experts": 8, "top_k": 2, "d_ff": 14336}


def make_checkpoint(folder: Path, size_bytes: float, dtype: torch.dtype) -> Config:
    """Write Mixtral 8x7B with as many layers as fit, every tensor of its own random numbers."""
    one, two = (sum(math.prod(weight.shape) for weight in native_weights(_config(layers)).values())
                for layers in (1, 2))
    layers = max(1, round((size_bytes / dtype.itemsize - one) / (two - one)) + 1)
    config = _config(layers)
    pieces = plan(config, FileLayout(), native_weights(config))
    folder.mkdir()
    sizes = {piece.key: (piece.shape, dtype) for piece in pieces}
    places = create_files(folder, config, sizes)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 24, generator=generator).to(dtype)
    for index, stored in enumerate(places):
        chunk = stored.chunks[0]
        with chunk.path.open("r+b") as file:
            file.seek(chunk.offset)
            left = math.prod(stored.shape)
            while left:
                part = block.roll(index * 1009)[:left]
                file.write(part.view(torch.uint8).numpy().tobytes())
                left -= len(part)
    return config


def create_files(folder: Path, config: Config, sizes: Sizes) -> list[Stored]:
    """Lay out the files as an export would."""
    opened = Opened("", folder, config, FileLayout(), {}, {}, [])
    return list(create(folder, config, FileLayout(), [], sizes, opened).values())


def _config(layers: int) -> Config:
    return parse_config({"model": {**MODEL, "num_layers": layers}, "attention": ATTENTION, "moe": MOE,
                         "data": {"tokenizer": "tokenizer.json"}},
                        "benchmark")


def forget(folder: Path) -> None:
    """Let the system drop the pages of all files from memory."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--to", default="moescale")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only-convert", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    source, target = arguments.folder / "source", arguments.folder / "target"
    if arguments.only_convert:
        started = time.perf_counter()
        convert(open_source(source), target, arguments.to, FileLayout())
        os.sync()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": time.perf_counter() - started, "peak_bytes": peak}))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        make_checkpoint(source, arguments.gigabytes * 1e9, getattr(torch, arguments.dtype))
        size = sum(path.stat().st_size for path in source.iterdir())
        forget(source)
        started = time.perf_counter()
        subprocess.run(["cp", "-r", source, target], check=True)
        os.sync()
        copied = time.perf_counter() - started
        shutil.rmtree(target)
        forget(source)
        command = [sys.executable, __file__, arguments.folder, "--to", arguments.to, "--only-convert"]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        seconds = result["seconds"]
        print(f"{size / 1e9:.2f} GB of {arguments.dtype} to {arguments.to}: cp {copied:.1f} s "
              f"({size / copied / 1e6:.0f} MB/s), conversion {seconds:.1f} s ({size / seconds / 1e6:.0f} MB/s), "
              f"{copied / seconds:.2f} times the speed of cp; largest memory {result['peak_bytes'] / 1e9:.2f} GB")
    finally:
        for left in (source, target, target.with_name("target.partial")):
            shutil.rmtree(left, ignore_errors=True)


if __name__ == "__main__":
    main()
