"""Time from the command to the end of the first step, of two checkouts in alternation.

    python tools/benchmark/startup.py OLD NEW [--ranks 2] [--rounds 7]

OLD and NEW are folders of this project. Prints minimum and median of each in seconds, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def start(folder: Path, ranks: int, cache: Path) -> float:
    """Train one step and return its seconds. cache: of tokens, which two versions may write differently"""
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        command = [*(command if ranks > 1 else [sys.executable, "-m"]), "moescale", "train", "configs/quickstart.yaml",
                   f"run.dir={run_dir}", "run.steps=1", "optim.warmup_steps=0", "monitor.eval_sequences=2",
                   f"parallel.ep={ranks}", f"data.cache_dir={cache}"]
        begin = time.perf_counter()
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)})
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    folders = [folder.resolve() for folder in arguments.folders]
    seconds: dict[Path, list[float]] = {folder: [] for folder in folders}
    with tempfile.TemporaryDirectory() as caches:
        for number in range(arguments.rounds + 1):
            for place, folder in enumerate(folders):
                elapsed = start(folder, arguments.ranks, Path(caches, str(place)))
                if number:  # the first one fills the caches
                    seconds[folder].append(elapsed)
    for folder, values in seconds.items():
        print(f"{folder}: minimum {min(values):.2f} s, median {statistics.median(values):.2f} s")
    old, new = (statistics.median(seconds[folder]) for folder in folders)
    print(f"ratio of the medians {new / old:.3f}")


if __name__ == "__main__":
    main()
