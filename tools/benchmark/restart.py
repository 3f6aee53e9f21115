"""How long a run takes from a rank that is killed to the next finished step.

    python tools/benchmark/restart.py --ranks 2 --kills 5 [--warm]

Starts torchrun on this machine, kills a rank with SIGKILL again and again, and prints the seconds of each
time and their median. Steps are logged one by one, and the hosts' memory holds the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
LIMIT_SECONDS = 120.0  # for one restart


def write_config(folder: Path, ranks: int) -> None:
    """Write a small configuration and its text."""
    draw = random.Random(0)
    words = ["routers", "send", "tokens", "to", "experts", "and", "back"]
    (folder / "text.txt").write_text("\n".join(" ".join(draw.choices(words, k=200)) for _ in range(200)))
    (folder / "held_out.txt").write_text(" ".join(draw.choices(words, k=2000)))
    (folder / "run.yaml").write_text(yaml.safe_dump({
        "run": {"dir": str(folder / "run"), "steps": 1_000_000},
        "data": {"files": [str(folder / "text.txt")], "held_out_files": [str(folder / "held_out.txt")],
                 "cache_dir": str(folder / "cache"), "seq_len": 64, "global_batch": ranks},
        "model": {"d_model": 64, "num_layers": 2, "vocab_size": 264},
        "moe": {"num_experts": 4, "d_ff": 64}, "parallel": {"ep": ranks},
        "monitor": {"every": 1, "moved_every": None},
        "checkpoint": {"every": 1_000_000, "in_memory": 5, "memory_dir": str(folder)},
    }))


def lines(folder: Path) -> list[dict[str, Any]]:
    """Read the figures of the steps so far."""
    file = folder / "run/metrics.jsonl"
    texts = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(text) for text in texts]


def wait_for(folder: Path, job: subprocess.Popen[bytes], after: float, steps: int) -> dict[str, Any]:
    """Wait for a process that began after this time to have finished so many steps; return its first one's figures."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline and job.poll() is None:
        found = [line for line in lines(folder) if line["time"] - line["seconds"] > after]
        if len(found) >= steps:
            return found[0]
        time.sleep(0.05)
    raise SystemExit(f"no step within {LIMIT_SECONDS:g} s of a kill, or the run ended")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--warm", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, given.ranks)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(given.ranks),
                   "--max-restarts", str(given.kills + 1), "-m", "moescale", "train", str(folder / "run.yaml")]
        command += ["--warm"] if given.warm else []
        with (folder / "log").open("wb") as log:
            job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={
                **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        seconds = []
        try:
            wait_for(folder, job, 0.0, 20)
            time.sleep(10 if given.warm else 1)  # until the spares are ready
            for number in range(given.kills):
                ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
                os.kill(int(ranks[number % len(ranks)]), signal.SIGKILL)
                killed = time.time()
                seconds.append(wait_for(folder, job, killed, 1)["time"] - killed)
                wait_for(folder, job, killed, 20)
        finally:
            job.send_signal(signal.SIGTERM)
            try:
                job.wait(60)
            except subprocess.TimeoutExpired:
                job.kill()
    print(f"{given.ranks} ranks{', warm' if given.warm else ''}: "
          f"{', '.join(f'{value:.1f}' for value in seconds)}; median {statistics.median(seconds):.1f} s, "
          f"worst {max(seconds):.1f} s")


if __name__ == "__main__":
    main()
