"""Measures the share of the time in which a run advances while faults strike it again and again.

    python tools/useful_time.py [--shape 2x1] [--minutes 60] [--every-minutes 10] [--seed 0]

A small model trains on hosts of this machine, as in tools/faults.py, and a fault that ends ranks is
drawn and planted every few minutes. What a fault costs is the time from it until the run is again
where it was, with the steps that it computes a second time. Fails where it does not come back.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from functools import partial
from typing import Any

from cluster import Cluster
from faults import GOES_ON, KINDS, RECOVER_SECONDS, Job, impossible, shared_disk


def is_back(before: int, struck: float, step: dict[str, Any]) -> bool:
    """Whether this step, later than `before`, was begun after a fault struck."""
    return bool(step["step"] > before and step["time"] - step["seconds"] > struck)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="2x1", help="hosts x ranks")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every-minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    hosts, ranks = map(int, given.shape.split("x"))
    draw = random.Random(given.seed)
    with Cluster(hosts) as cluster:
        job = Job(cluster, ranks, shared_disk(cluster) / "run", ["run.steps=1000000"])
        kinds = [kind for kind in KINDS if kind not in GOES_ON | impossible(cluster)]
        if not job.wait_for_steps(12):
            sys.exit(job.said(0).read_text()[-3000:])
        first, began, costs = job.last_step(), time.monotonic(), []
        for number in range(1, int(given.minutes / given.every_minutes) + 1):
            middle = (number - 0.5) * given.every_minutes * 60  # of each stretch
            job.wait(began + middle - time.monotonic())
            before, struck, kind = job.last_step(), time.time(), draw.choice(kinds)
            KINDS[kind](job, draw)
            found = job.wait_for(partial(is_back, before, struck), 2 * RECOVER_SECONDS)
            if found is None:
                sys.exit("\n".join(job.said(host).read_text()[-3000:] for host in range(hosts)))
            costs.append(found["time"] - struck)
            print(f"{kind} at step {before}: back after {costs[-1]:.1f} s", flush=True)
        job.wait(began + given.minutes * 60 - time.monotonic())
        seconds = time.monotonic() - began
        print(
            f"{given.shape}: {job.last_step() - first} steps in {seconds / 60:.1f} minutes with "
            f"{len(costs)} faults; {1 - sum(costs) / seconds:.3f} of the time useful"
        )


if __name__ == "__main__":
    main()
