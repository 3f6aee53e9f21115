"""What a run of wandb holds, written offline and read back with wandb's own reader."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moescale.cli import app
from moescale.config import parse_config
from moescale.engine.base import LayerCounts, RoutingCounts
from moescale.monitor.routing_metrics import routing_metrics
from moescale.monitor.wandb import Wandb
from moescale.monitor.wandb_workspaces import make_workspace
from moescale.record.figures import figure
from moescale.trainer import train
from tests.support.groups import in_groups

wandb = pytest.importorskip("wandb")
LAYERS, EXPERTS = 48, 128
ROOT = Path(__file__).parent.parent.parent


def make_metrics(step: int) -> dict[str, Any]:
    """What a large run logs, through the same words as the trainer's."""
    rng = random.Random(step)
    metrics: dict[str, Any] = {"loss": 3.0 - step / 100, "tokens": step, "tokens_per_second": 1e5, "grad_norm": 1.0}
    layers = {layer: LayerCounts(
        tokens_per_expert=[rng.randrange(50, 150) for _ in range(EXPERTS)], dropped=7, wanted=7, tokens=7, entropy=7.0,
        confidence=7.0, load_balance_loss=7.0, router_z_loss=7.0, slots=7.0, surplus=7, other_ranks=7, other_nodes=7,
        bytes_sent=7, expert_bias=[rng.random() for _ in range(EXPERTS)]) for layer in range(LAYERS)}
    return {**metrics, **routing_metrics(RoutingCounts(layers, [[1] * 32] * 32))}


def read_back(run_dir: Path) -> list[dict[str, Any]]:
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return read_segment(file.parent)


def read_segment(folder: Path) -> list[dict[str, Any]]:
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_an_offline_run_holds_all_that_was_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = Wandb(tmp_path, "test", "offline", {"moe": {"num_experts": EXPERTS}, "parallel": {"ep": 4}})
    for step in (10, 20):
        alerts = {"alerts": ["dead experts: layer 1, 1 of 128 (3)"]} if step == 20 else {}
        sink.write(step, {**make_metrics(step), **alerts})
    sink.close()
    records = read_back(tmp_path)
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert len(rows) == 2
    last = rows[-1]
    keys = {key.partition(".")[0] for key in last if not key.startswith("_")}  # wandb adds "._type" and so on
    assert len(keys) <= 200
    assert all(figure(key) for key in keys)
    assert keys >= {"loss", "moe/max_load", "moe/dropped_share", "moe/entropy", "moe/load_map", "moe/load_history",
                    "moe/load_histogram", "moe/expert_bias_histogram", "moe/layer_00/max_load", "moe/layer_47/entropy"}
    assert last["moe/max_load"] == make_metrics(20)["moe/max_load"]
    assert last["moe/load_map._type"] == "image-file"
    assert last["moe/load_histogram._type"] == "histogram"
    assert sum(last["moe/load_histogram.values"]) == LAYERS * EXPERTS
    (alert,) = (record["alert"] for record in records if record["type"] == "alert")
    assert alert["title"] == "dead experts"
    (config,) = (record["run"]["config"]["update"] for record in records if record["type"] == "run")
    assert config["parallel"] == {"ep": 4}, "the layout is part of the configuration"
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/moe/*.png"))) == 4


def test_a_run_that_goes_on_sends_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off at step 30, it goes on from the checkpoint of step 10; then it is trained anew."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    said: list[str] = []
    for resumed, steps in ((None, (10, 20, 30)), (Path("step_10"), (20, 30, 40, 50)), (None, (10,))):
        time.sleep(1.1)  # wandb names its folders by the second
        sink = Wandb(tmp_path, "test", "offline", {"optim": {"lr": len(steps)}}, resumed_from=resumed, say=said.append)
        for step in steps:
            sink.write(step, {"loss": 1.0 / step})
        sink.close()
    segments = sorted(tmp_path.glob("wandb/offline-run-*"))
    rows = [[record["history"]["item"] for record in read_segment(folder) if record["type"] == "history"]
            for folder in segments]
    assert [[(row["step"], row["_step"]) for row in each] for each in rows] == [
        [(10, 10), (20, 20), (30, 30)], [(40, 40), (50, 50)], [(10, 10)]], "each goes on behind what was sent"
    first, second, anew = (folder.name.rpartition("-")[2] for folder in segments)
    assert first == second != anew
    assert len(said) == 1
    assert "30" in said[0]


FAILING = """
import os, signal, subprocess, sys, time
import moescale.monitor.wandb as ours
from pathlib import Path
from tests.support.groups import in_groups
how, folder = sys.argv[1:]
ours.SECONDS_TO_OPEN, ours.SECONDS_TO_CLOSE = 3, 2
started = time.monotonic()
if how in ("unreachable", "wrong"):
    os.environ.update(WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="a" * 40 if how == "unreachable" else "short")
sink = ours.Wandb(Path(folder), "test", "offline" if how in ("killed", "stopped") else "online", {})
sink.write(1, {"loss": 2.0})
if how in ("killed", "stopped"):
    time.sleep(1)
    services = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
    for service in services:
        os.kill(int(service), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
for step in range(2, 50):
    sink.write(step, {"loss": 1.0})
sink.close()
print(f"took {time.monotonic() - started:.0f}")
if how == "stopped":
    for service in services:
        os.kill(int(service), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["unreachable", "wrong", "missing", "killed", "stopped"])
def test_a_view_of_a_run_never_ends_or_delays_it(tmp_path: Path, how: str) -> None:
    """No server, a wrong key, none, a service that was killed or stands still: one line, and what could be kept."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment.update(HOME=str(tmp_path), WANDB_CONFIG_DIR=str(tmp_path / "home"), PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", FAILING, how, str(tmp_path)], capture_output=True, text=True,
                          timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    line, took = done.stdout.splitlines()
    assert line.startswith("wandb")
    assert int(took.split()[1]) < 20
    if how in ("unreachable", "wrong", "missing"):
        rows = [record for record in read_back(tmp_path) if record["type"] == "history"]
        assert len(rows) == 49, "kept offline"


def test_artifacts_hold_what_a_run_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that saves, and one that goes on from there and saves again."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "config.yaml").write_text("run: {steps: 20}\n")
    checkpoints = [tmp_path / f"checkpoints/step_{step:08d}" for step in (10, 20)]
    before: Path | None = None
    found: list[dict[str, Any]] = []
    for step, checkpoint in zip((10, 20), checkpoints, strict=True):
        sink = Wandb(tmp_path, "test", "offline", {"parallel": {"ep": 4}}, artifacts=True, resumed_from=before)
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights.bin").write_bytes(bytes(1000))
        sink.saved(step, checkpoint)
        sink.close()
        (file,) = tmp_path.glob("wandb/offline-run-*")
        records = read_back(tmp_path)
        found.append({f"{a['name'].partition('-')[0]}{' used' * a.get('use_after_commit', False)}": a
                      for a in (record["artifact"] for record in records if record["type"] == "artifact")})
        file.rename(tmp_path / "wandb" / file.name.replace("offline-", f"{step}-"))
        before = checkpoint
    first, second = found
    assert first.keys() == {"config", "code", "checkpoint"}
    assert second.keys() == {*first, "checkpoint used"}
    assert paths(first["config"]) == {"config.yaml", "layout.json"}
    assert {"trainer.py", "report/assets/report.js"} <= paths(first["code"])
    (layout,) = (each for each in first["config"]["manifest"]["contents"] if each["path"] == "layout.json")
    assert json.loads(Path(layout["local_path"]).read_text()) == {"ep": 4}
    (weights,) = first["checkpoint"]["manifest"]["contents"]
    assert weights["ref"] == (checkpoints[0] / "weights.bin").as_uri()
    assert not weights.get("local_path"), "no weights are sent"
    used = second["checkpoint used"]
    assert [used[key] for key in ("name", "digest", "type")] == [
        first["checkpoint"][key] for key in ("name", "digest", "type")], "what the first run saved"
    assert second["checkpoint"]["name"] == used["name"]
    assert second["checkpoint"]["digest"] != used["digest"]
    assert "step_00000020" in second["checkpoint"]["aliases"]


def paths(artifact: dict[str, Any]) -> set[str]:
    return {each["path"] for each in artifact["manifest"]["contents"]}


def test_the_dashboard_shows_what_a_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a few steps, and hold the panels of the saved view to the keys and pictures of that run."""
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(parse_config({
        "run": {"dir": str(tmp_path), "steps": 2}, "optim": {"warmup_steps": 0},
        "data": {"files": [str(Path(__file__).parent / "*.py")], "cache_dir": str(tmp_path / "cache"), "seq_len": 32,
                 "global_batch": 2},
        **in_groups({"vocab_size": 264, "d_model": 16, "num_layers": 2,
                     "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}),
        "moe": {"num_experts": 4, "d_ff": 16},
        "monitor": {"every": 1, "moved_every": 1, "wandb": "offline", "wandb_artifacts": True},
    }, "test"))
    records = read_back(tmp_path)
    keys = {key.partition(".")[0] for record in records if record["type"] == "history"
            for key in record["history"]["item"]}
    sections = make_workspace("someone", "test")._to_model().model_dump(by_alias=True)["spec"]["section"][
        "panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Training", "Load of the experts", "Heat maps", "Router"]
    panels = [panel["config"] for section in sections for panel in section["panels"]]
    shown = {key for panel in panels for key in (panel.get("metrics") or panel.get("mediaKeys") or ())}
    assert len(shown) > 15
    assert shown <= keys
    patterns = [panel["metricRegex"] for panel in panels if panel.get("metricRegex")]
    assert [sum(bool(re.fullmatch(pattern, key)) for key in keys) for pattern in patterns] == [2, 2], "each layer's"
    assert all(panel["xAxis"] in keys for panel in panels if "xAxis" in panel)
    (saved,) = (record["artifact"] for record in records if record["type"] == "artifact"
                and record["artifact"]["type"] == "model")
    assert "step_00000002" in saved["aliases"]
    monkeypatch.setattr("moescale.monitor.wandb_workspaces.knows_key", lambda: False)
    result = CliRunner().invoke(app, ["dashboard", str(tmp_path), "--entity", "someone"])
    assert result.exit_code == 2
    assert result.output.splitlines() == [
        "moescale: moescale dashboard needs a key of wandb, and there is none here: run wandb login first"]
