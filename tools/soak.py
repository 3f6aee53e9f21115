"""Plants faults at random in a run that nobody attends to, and holds its end to a quiet one.

    python tools/soak.py [--shape 2x2] [--faults 100] [--steps 1400] [--seed 0] [--record]

The same run is trained twice on hosts of this machine: undisturbed, and with faults of the kinds of
tools/faults.py, drawn by the seed, one every few steps. In both a gradient is no number in every
25th step (tools/spoilt_run.py), whose update is left out. Fails unless the disturbed run ends by
itself, its last checkpoint has the same bytes, each time it went on from the newest checkpoint or a
later step, and no process, namespace or file is left.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cluster import ROOT, Cluster, leftovers
from faults import KINDS, RECOVER_SECONDS, Job, impossible, note, shared_disk, strike
from small_run import SPOILT_EVERY

LOSES = {"newest_checkpoint_damaged"}  # which goes on from the one before
END_SECONDS = 110.0
CHECKPOINT_EVERY = 5
STEPS_BETWEEN = (2, 12)  # faults, drawn anew each time; on average more than between checkpoints


def checkpoints(run_dir: Path) -> list[int]:
    """Find the complete checkpoints that no fault has damaged. -> their steps"""
    found = [path.parent.name for path in (run_dir / "checkpoints").glob("step_*/checkpoint.json")]
    return [int(name[5:]) for name in found if name[5:].isdigit()]


def newest_checkpoint(run_dir: Path) -> int:
    """Find the newest of them. -> its step, 0 where there is none"""
    return max(checkpoints(run_dir), default=0)


def saved_bytes(run_dir: Path) -> dict[str, list[int]]:
    """Read size and CRC-32 of each file of tensors of the newest checkpoint."""
    folder = run_dir / "checkpoints" / f"step_{newest_checkpoint(run_dir):08d}"
    files = json.loads((folder / "checkpoint.json").read_text())["files"]
    return {name: files[name] for name in sorted(files) if name.endswith(".distcp")}


def train(
    shape: str,
    steps: int,
    kinds: Sequence[str],
    count: int,
    draw: random.Random,
    record: bool = False,
) -> tuple[list[str], dict[str, list[int]], Counter[str]]:
    """Train to the last step, with so many faults of these kinds on the way.

    record: whether each becomes a line of the results of tools/faults.py.
    -> what went wrong; the files of the last checkpoint; the faults, by kind
    """
    hosts, ranks = map(int, shape.split("x"))
    problems: list[str] = []
    saved: dict[str, list[int]] = {}
    done: Counter[str] = Counter()
    words = [f"run.steps={steps}", f"checkpoint.every={CHECKPOINT_EVERY}", "spikes.not_finite=skip"]
    spoilt = {"PYTHON_EXEC": str(ROOT / "tools/spoilt_run.py")}
    with Cluster(hosts) as cluster:
        run_dir = shared_disk(cluster) / "run"
        job = Job(cluster, ranks, run_dir, words, spoilt)
        possible = [kind for kind in kinds if kind not in impossible(cluster)]
        while sum(done.values()) < count and not problems:
            if not job.wait_for_steps(draw.randint(*STEPS_BETWEEN)):
                problems.append("no step is done any more")
                break
            held, before, kind = newest_checkpoint(run_dir), job.last_step(), draw.choice(possible)
            while kind in LOSES and len(checkpoints(run_dir)) < 2:  # there is none before it
                kind = draw.choice(possible)
            if before > steps - 2 * STEPS_BETWEEN[1]:
                print("the run is nearly over", flush=True)
                break
            line = strike(job, kind, draw)
            done[kind] += 1
            print(json.dumps({"step": before, "held": held, **line}), flush=True)
            if record:
                note(line)
            if line["seconds"] is None:
                problems.append(f"{kind} at step {before}: no step in {RECOVER_SECONDS:.0f} s")
            elif kind not in LOSES and before - line["lost_steps"] < held:
                problems.append(f"{kind} at step {before} lost steps that a checkpoint held")
        deadline = time.monotonic() + END_SECONDS + steps / 2
        while not job.tend() and time.monotonic() < deadline and not problems:
            time.sleep(0.1)
        if job.last_step() != steps:
            problems.append(f"it ended after step {job.last_step()} of {steps}")
        else:
            saved = saved_bytes(run_dir)
        problems += [
            f"step {step['step']} was to be spoilt, and has a gradient norm"
            for step in job.steps()
            if step["step"] % SPOILT_EVERY == 0 and "grad_norm" in step
        ]
        problems += [
            f"{path} is left"
            for path in run_dir.rglob("*")
            if ".partial" in path.name or path.name.startswith(".probe")
        ]
        if problems:
            problems += [job.said(host).read_text()[-3000:] for host in range(hosts)]
        token = cluster.folder.name
    return problems + [f"{thing} is left" for thing in leftovers(token)], saved, done


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="2x2", help="hosts x ranks")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--record", action="store_true", help="add to the results of tools/faults.py"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    draw, began = random.Random(given.seed), time.monotonic()
    problems, quiet, _ = train(given.shape, given.steps, [], 0, draw)
    more, disturbed, done = train(
        given.shape, given.steps, given.kinds, given.faults, draw, given.record
    )
    problems += more
    if not problems and quiet != disturbed:
        problems.append("the last checkpoint has other bytes than that of the quiet run")
    print(f"{dict(done)} in {time.monotonic() - began:.0f} s")
    print("\n".join(problems) or "the same bytes as without faults, nothing lost, nothing left")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
