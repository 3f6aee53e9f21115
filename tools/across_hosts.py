"""Losses of a small model whose parallelism crosses hosts, held to those of one process.

    python tools/across_hosts.py [--layouts 2x1:tp=2 4x1:pp=2,ep=2 ...]

A layout says hosts x ranks on each, and what differs in `parallel`. Each one trains for a few steps
under launch/torchrun.sh, on hosts that are network namespaces where that is allowed, and prints the
largest relative difference of a loss to that of the same step on one process. Ends with status 1
where it is above 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cluster import ROOT, Cluster
from rich.console import Console
from rich.table import Table
from small_run import SMALL_RUN

LAYOUTS = (
    "2x1:tp=2 2x1:cp=2 2x1:pp=2 2x1:ep=2 2x1:dp_replicate=2 2x2:ep=4,dispatcher=hierarchical "
    "2x2:tp=2,pp=2 4x1:tp=4 4x1:pp=4 4x1:ep=4 4x1:tp=2,ep=4 4x1:pp=2,ep=2"
)
TOLERANCE = 1e-5
RUN_SECONDS = 110
SIX_STEPS = ["optim.warmup_steps=2", "run.steps=6"]


def small(folder: Path, name: str) -> list[str]:
    """Write the words that train the small model into a folder's run of this name."""
    return ["train", *SMALL_RUN, *SIX_STEPS, f"data.cache_dir={folder}/cache", f"run.dir={folder}/{name}"]


def losses(run_dir: Path) -> list[float]:
    """Read the loss of each step of a run."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def train_alone(words: Sequence[str]) -> None:
    """Train on one process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moescale", *words]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def train_across(cluster: Cluster, ranks: int, words: Sequence[str]) -> None:
    """Train on all hosts of a cluster. Raises RuntimeError with what they said where they fail."""
    said = [cluster.folder / f"host{host}.log" for host in range(cluster.size)]
    agents = [
        cluster.launch(host, words, ranks=ranks, output=path.open("w"))
        for host, path in enumerate(said)
    ]
    statuses = [agent.wait(RUN_SECONDS) for agent in agents]
    if any(statuses):
        raise RuntimeError("\n".join(path.read_text()[-2000:] for path in said))


def difference(layout: str, folder: Path) -> tuple[float, float]:
    """Train in a layout. -> the largest relative difference to the run `one`, and the seconds"""
    shape, _, degrees = layout.partition(":")
    hosts, ranks = map(int, shape.split("x"))
    began, name = time.monotonic(), layout.replace(":", "_")
    with Cluster(hosts) as cluster:
        changes = [f"parallel.{degree}" for degree in degrees.split(",") if degree]
        train_across(cluster, ranks, [*small(folder, name), *changes])
    ours, wanted = losses(folder / name), losses(folder / "one")
    worst = max(abs(a - b) / b for a, b in zip(ours, wanted, strict=True))
    return worst, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS.split())
    given = parser.parse_args()
    os.chdir(ROOT)
    table = Table("hosts x ranks", "parallel", "largest difference", "seconds")
    worst = 0.0
    with Cluster(0) as scratch:
        if scratch.reason is not None:
            print(f"hosts share the loopback of this machine: {scratch.reason}", file=sys.stderr)
        train_alone(small(scratch.folder, "one"))
        for layout in given.layouts:
            found, seconds = difference(layout, scratch.folder)
            shape, _, degrees = layout.partition(":")
            table.add_row(shape, degrees, f"{found:.1e}", f"{seconds:.0f}")
            worst = max(worst, found)
            print(layout, f"{found:.1e}", f"{seconds:.0f} s", file=sys.stderr, flush=True)
    Console(width=100).print(table)
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
