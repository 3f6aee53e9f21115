"""A run under DeepSpeed from the command line: both launchers, the other engine, a contradiction in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--nproc-per-node", "2", "-m"]
DEEPSPEED = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--module"]


def train(launcher: list[str], *words: str) -> tuple[int, str]:
    """Train on two ranks in the current folder. -> exit status, output"""
    command = [*launcher, "moescale", "train", "tiny.yaml", "parallel.ep=2", "checkpoint.every=3",
               "optim.schedule=constant", "optim.warmup_steps=2", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    return done.returncode, done.stdout + done.stderr


def figures(run: str) -> dict[int, list[float]]:
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: [row["loss"], row["grad_norm"]] for row in rows if "loss" in row}


@pytest.mark.slow
def test_both_launchers_train_and_go_on(here: Path) -> None:
    (here / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}))
    zero = ["run.engine=deepspeed", "run.dir=run"]
    for launcher, words in (
        (TORCHRUN, ["run.dir=whole", "run.steps=9"]), (TORCHRUN, [*zero, "run.steps=3"]),
        (DEEPSPEED, [*zero, "run.steps=6", "run.deepspeed=ds.json"]), (TORCHRUN, ["run.dir=run", "run.steps=9"]),
    ):
        status, output = train(launcher, *words)
        assert status == 0, output
    whole, run = figures("whole"), figures("run")
    assert sorted(run) == list(range(1, 10))
    for step, expected in whole.items():
        assert run[step] == pytest.approx(expected, rel=1e-5), f"step {step}"


@pytest.mark.slow
def test_a_contradiction_is_said_once_and_nothing_is_left(here: Path) -> None:
    (here / "bad.json").write_text(json.dumps({"gradient_clipping": 0.5}))
    status, output = train(TORCHRUN, "run.dir=bad", "run.engine=deepspeed", "run.deepspeed=bad.json")
    assert status != 0
    assert output.count("says gradient_clipping=0.5, and optim.clip_norm=1.0") == 1
    assert not (here / "bad").exists()
