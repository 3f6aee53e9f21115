"""A soak passes a job that survives, and finds one that forgets steps or ends with other bytes."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.command_line import ROOT

sys.path.append(str(ROOT / "tools"))  # its scripts find each other so
import soak
from cluster import Cluster

# An agent and its one rank, which trains by counting: a line of figures a step, a checkpoint every
# five. The rank goes on from the newest checkpoint, or, as a faulty one, from the start.
AGENT = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run, steps, fault = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if "RANK" not in os.environ:
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    while True:
        rank = subprocess.Popen([sys.executable, *sys.orig_argv[1:]],
                                env={**os.environ, "RANK": "0", "LOCAL_RANK": "0"})
        while rank.poll() is None:
            if asked:
                rank.terminate()
            time.sleep(0.01)
        if rank.returncode == 0 or asked:
            sys.exit(rank.returncode and 75)
began = time.time()
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
held = sorted((run / "checkpoints").glob("step_*/checkpoint.json"))
step = int(held[-1].parent.name[5:]) if held and fault != "forgets" else 0
figures = run / "metrics.jsonl"
lines = figures.read_text().splitlines(True)[:step] if step else []
restarted = bool(held)
with figures.open("w") as file:
    file.writelines(lines)
    while step < steps:
        time.sleep(0.01)
        step += 1
        now = time.time()
        file.write(json.dumps({"step": step, "time": now, "seconds": now - began}) + "\\n")
        file.flush()
        if step % 5 == 0:
            folder = run / "checkpoints" / f"step_{step:08d}"
            folder.mkdir(exist_ok=True)
            crc = step + (fault == "differs" and restarted)
            files = {"__0_0.distcp": [8, crc], "config.yaml": [1, now]}
            (folder / "new").write_text(json.dumps({"files": files}))
            (folder / "new").rename(folder / "checkpoint.json")
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", ""),
        ("forgets", "lost steps that a checkpoint held"),
        ("differs", ""),
    ],
)
def test_a_soak_judges_a_job(monkeypatch: pytest.MonkeyPatch, fault: str, said: str) -> None:
    def launch(cluster: Cluster, host: int, arguments: Sequence[str], **given: Any) -> Any:
        words = dict(word.split("=", 1) for word in arguments if "=" in word)
        command = [sys.executable, "-c", AGENT, words["run.dir"], words["run.steps"], fault]
        return cluster.start(host, command, dict(os.environ), given["output"])

    monkeypatch.setattr(Cluster, "launch", launch)
    draw = random.Random(0)
    problems, quiet, _ = soak.train("1x1", 80, [], 0, draw)
    assert problems == []
    problems, disturbed, done = soak.train(
        "1x1", 80, ["rank_killed", "host_lost", "preempted"], 3, draw
    )
    if said:
        assert any(said in problem for problem in problems)
        return
    assert problems == []
    assert sum(done.values()) == 3
    assert (quiet == disturbed) is (fault == "none")
