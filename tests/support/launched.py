"""Runs under real agents, which are disturbed and read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.support.command_line import ROOT


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def launch(
    folder: Path, run: str, *words: str, restarts: int = 0, ranks: int = 2,
    launcher: tuple[str, ...] = ("--standalone",), agent: str = "torch.distributed.run",
) -> subprocess.Popen:
    """Start an agent on `folder/tiny.yaml`, with so many ranks here. launcher: how agents meet; agent: its module"""
    command = [sys.executable, "-m", agent, *launcher, "--nproc-per-node", str(ranks),
               "--max-restarts", str(restarts), "-m", "moescale", "train", str(folder / "tiny.yaml"),
               f"run.dir={folder / run}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """Find the processes that it started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == launcher.pid and fields[0] != "Z":
                found.append(int(entry.name))
    return sorted(found)


def forked_for(local_rank: int, folder: Path, started: list[int]) -> int:
    """Find the rank that a spare has forked: the child of a process that has no other as its parent.

    folder: for temporary files, which all of them know. started: what the launcher started itself.
    """
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in started:
            with suppress(OSError):
                words = (entry / "environ").read_bytes().split(b"\0")
                if {f"TMPDIR={folder}".encode(), f"LOCAL_RANK={local_rank}".encode()} <= set(words):
                    stat = (entry / "stat").read_text().rpartition(")")[2]
                    parents[int(entry.name)] = int(stat.split()[1])
    (rank,) = (process for process, parent in parents.items()
               if parent in parents and parents[parent] not in parents)
    return rank


def wait_for_steps(launcher: subprocess.Popen, run: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < steps:
        assert time.monotonic() < deadline, "no steps"
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.02)


def end(launcher: subprocess.Popen) -> str:
    try:
        return launcher.communicate(timeout=150)[0]
    finally:
        launcher.kill()
