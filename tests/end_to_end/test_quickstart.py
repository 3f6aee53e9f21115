"""The main job at its full size: the same figures in every layout, and a model worth having. Minutes long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moescale.monitor.routing_metrics import WHOLE
from tests.support.runs import MEASURED

ROOT = Path(__file__).parent.parent.parent
LAYOUTS = [
    (2, ["parallel.ep=1"]), (2, ["parallel.ep=2"]), (2, ["parallel.dp_replicate=2"]), (4, ["parallel.ep=1"]),
    (4, ["parallel.ep=2"]), (4, ["parallel.ep=4"]), (4, ["parallel.ep=2", "parallel.dp_replicate=2"]),
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def train(run: Path, ranks: int, *overrides: str) -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
               "moescale", "train", str(ROOT / "configs/quickstart.yaml"), f"run.dir={run}", *overrides]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_twenty_steps_are_the_same_in_every_layout(tmp_path: Path) -> None:
    short = ["run.steps=20", "optim.warmup_steps=10", "monitor.every=1", "data.micro_batch=4",
             "precision.compute=float32", "checkpoint.every=1000"]
    expected = train(tmp_path / "one", 1, *short)
    worst = 0.0
    for number, (ranks, layout) in enumerate(LAYOUTS):
        got = train(tmp_path / str(number), ranks, *short, *layout)
        for line, reference in zip(got, expected, strict=True):
            for key, value in reference.items():
                if key == "alerts" or (key.startswith("moe/layer_") and key.endswith(WHOLE)):
                    assert line[key] == value, f"{layout} step {line['step']} {key}"
                elif key not in MEASURED:
                    worst = max(worst, abs(line[key] - value) / max(abs(value), 1e-12))
                    assert line[key] == pytest.approx(value, rel=1e-5), f"{layout} step {line['step']} {key}"
    print(f"{len(LAYOUTS) + 1} layouts, largest relative difference {worst:.1e}")


def test_the_main_job_learns_and_balances(tmp_path: Path) -> None:
    lines = train(tmp_path / "run", 2, "parallel.ep=2")
    bits = lines[-1]["eval_bits_per_byte"]
    loads = [counts for line in lines[-5:] for key, counts in line.items() if key.endswith("tokens_per_expert")]
    idlest = min(min(counts) * len(counts) / sum(counts) for counts in loads)
    print(f"{bits:.3f} bits a byte, idlest expert {idlest:.2f} of the mean")
    assert bits <= 2.5
    assert idlest >= 0.25
