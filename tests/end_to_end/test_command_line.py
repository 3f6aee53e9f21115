"""The command line as a person drives it: train, kill, go on, generate; and mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import moescale
from moescale.cli import app
from moescale.config import memory_asked
from tests.support.command_line import ROOT
from tests.support.runs import check_figures


def torchrun(ranks: int, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
               "moescale", "train", "tiny.yaml", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_train_kill_go_on_generate(here: Path) -> None:
    slow = torchrun(2, "parallel.ep=2", "run.steps=4000")
    deadline = time.monotonic() + 90
    while not (here / "run/checkpoints/step_00000010").exists():
        assert time.monotonic() < deadline, "no checkpoint appeared"
        assert slow.poll() is None, slow.communicate()[0]
        time.sleep(0.02)
    slow.kill()  # torchrun alone: its ranks must not live on and write beside the next run
    slow.wait()
    before = (here / "run/metrics.jsonl").read_text().splitlines()
    assert max(steps(here / "run")) < 4000

    done = max(int(folder.name[5:]) for folder in (here / "run/checkpoints").glob("step_????????")) + 20
    again = torchrun(1, "parallel.ep=1", f"run.steps={done}")
    output = again.communicate(timeout=90)[0]
    assert again.returncode == 0, output
    assert "going on from run/checkpoints/step_" in output
    assert "held-out loss" in output
    assert steps(here / "run") == list(range(1, done + 1)), "each step stands once, in order"
    lines = [json.loads(line) for line in (here / "run/metrics.jsonl").read_text().splitlines()]
    assert [json.dumps(line) for line in lines[:8]] == before[:8]
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        check_figures(line)
        assert sum(line["moe/layer_01/tokens_per_expert"]) == 4 * 32 * 2 - line["moe/layer_01/dropped"]
        assert line["tokens"] == line["step"] * 4 * 32
    assert {"load_balance_loss", "router_z_loss", "grad_norm", "lr", "tokens_per_second"} < lines[0].keys()
    assert lines[-1].keys() >= {"eval_loss", "eval_bits_per_byte"}
    assert yaml.safe_load((here / "run/config.yaml").read_text())["data"]["micro_batch"] == 2
    assert sorted((here / "run").iterdir()) == [here / "run" / name for name in ("checkpoints", "config.yaml",
                                                                                 "held_out_routing.npz",
                                                                                 "metrics.jsonl")]
    command = ["generate", "run", "--prompt", "the quick ", "--tokens", "30", "--temperature", "0.5", "--top-k", "9"]
    first, second = (CliRunner().invoke(app, command) for _ in range(2))
    assert first.exit_code == 0
    assert first.output.startswith("the quick ")
    assert len(first.output.encode()) >= len("the quick ") + 30
    assert first.output == second.output, "the same seed writes the same text"
    model = moescale.load("run")
    logits = model.logits(torch.randint(256, (3, 7)))
    assert logits.shape == (3, 7, 264)
    assert logits.dtype == torch.float32


def run(*arguments: str, config: str = "tiny.yaml") -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", config, *arguments])
    assert not isinstance(result.exception, Exception), result.exception
    return result.exit_code, result.output


def mistake(*arguments: str, config: str = "tiny.yaml") -> str:
    """Try what cannot work. -> the line that says so"""
    status, output = run(*arguments, config=config)
    errors = [line for line in output.splitlines() if line.startswith("moescale: ")]
    assert status == 2, output
    assert len(errors) == 1, output
    return errors[0]


@pytest.mark.parametrize(("override", "words"), [
    ("moe.num_expert=4", "did you mean moe.num_experts?"),
    ("modle.d_model=8", "did you mean model?"),
    ("model.top_k=1", "did you mean moe.top_k?"),
    ("data.seq_len=many", "data.seq_len=many must be a whole number"),
    ("model.d_model=36", "use 32"),
    ("model.d_model", "write model.d_model=VALUE"),
    ("attention.window=0", "attention.window=0 must be at least 1"),
    ("attention.num_kv_heads=3", "use 1 or 2"),
    ("moe.top_k=5", "at most moe.num_experts=4"),
    ("moe.router=switch", "write moe.top_k=1"),
    ("parallel.ep=3", "parallel.ep=3 must divide moe.num_experts=4: use 1"),
    ("parallel.tp=2", "parallel.tp=2 is 2 ranks, which must divide the 1 that were started: use 1"),
    ("parallel.dp_shard=2", "write parallel.dp_shard=1 or -1"),
    ("data.micro_batch=3", "use 1, 2 or 4"),
    ("data.files=[missing.txt]", "missing.txt"),
    ("data.tokenizer=missing.json", "missing.json"),
    ("data.seq_len=100000", "data.seq_len=100000"),
    ("model.vocab_size=200", "at least 257"),
    ("optim.lr=.nan", "optim.lr=.nan must be a number"),
    ("optim.warmup_steps=40", "below run.steps=40"),
    ("monitor.trace=10-12", "write the first and the last step, e.g. steps:10-12"),
    ("run.dir=tiny.yaml", "run.dir=tiny.yaml cannot be made"),
])
def test_mistakes_end_with_one_line(here: Path, override: str, words: str) -> None:
    assert words in mistake(override)
    assert not (here / "run" / "checkpoints").exists()


def test_files_that_are_not_text(here: Path) -> None:
    (here / "empty.txt").write_text("")
    assert "empty" in mistake("data.files=[empty.txt]")
    (here / "binary.txt").write_bytes(bytes(range(256)) * 10)
    assert "binary.txt" in mistake("data.files=[binary.txt]")
    (here / "list.yaml").write_text("- 1\n")
    assert "list.yaml" in mistake(config="list.yaml")
    (here / "broken.yaml").write_text("run: {dir: a\n")
    assert "broken.yaml is not YAML" in mistake(config="broken.yaml")
    (here / "child.yaml").write_text("base: parent.yaml\n")
    (here / "parent.yaml").write_text("base: tiny.yaml\n")
    assert "only one level is allowed" in mistake(config="child.yaml")
    assert "did you mean tiny.yaml?" in mistake(config="tiiny.yaml")


def test_what_a_run_left_is_not_damaged(here: Path) -> None:
    assert run("run.steps=10")[0] == 0
    status, output = run("run.steps=10")
    assert status == 0
    assert "the run is complete" in output
    kept = {path: path.read_bytes() for path in sorted((here / "run").rglob("*")) if path.is_file()}
    assert "run.seed=0" in mistake("run.steps=20", "run.seed=1")
    assert "checkpoint of another model" in mistake("run.steps=20", "model.d_model=40")
    assert {path: path.read_bytes() for path in sorted((here / "run").rglob("*")) if path.is_file()} == kept
    part = here / "run/checkpoints/step_00000010/__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-100])
    result = CliRunner().invoke(app, ["generate", "run"])
    assert result.exit_code == 2
    assert "damaged" in result.output
    assert CliRunner().invoke(app, ["generate", "text"]).exit_code == 2


def test_a_full_disk_keeps_the_last_checkpoint(here: Path) -> None:
    """A limit on the size of files stands in for the disk: it too cuts a write in the middle."""
    assert run("run.steps=5")[0] == 0
    limit = 20_000
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" + (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nfrom moescale.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code, "train", "tiny.yaml", "run.steps=10"], capture_output=True,
                            text=True, timeout=90, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 2, result.stderr
    assert "no checkpoint of step 10 could be written" in result.stderr
    assert "the last good one is step_00000005" in result.stderr
    assert run("run.steps=10")[0] == 0, "with room again, the run goes on"


def test_help_teaches(here: Path) -> None:
    for command in ("train", "generate", "report"):
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert f"moescale {command}" in result.output


def test_help_shows_what_stands_in_brackets(here: Path) -> None:
    def help_of(command: str) -> str:
        return " ".join(CliRunner().invoke(app, [command, "--help"]).output.split())

    assert "true and [a, b] as there" in help_of("train")
    assert help_of("evaluate").count("data.files=[texts/*") == 2


@pytest.mark.parametrize(("arguments", "status"), [("--help", 0), ("no-such-command", 2)])
def test_one_of_many_ranks_leaves_without_taking_the_interpreter_down(arguments: str, status: int) -> None:
    code = "import atexit, os; atexit.register(os.abort); from moescale.cli import main; main()"
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code, arguments], env=environment, capture_output=True, text=True,
                           timeout=60)
    assert ended.returncode == status
    assert "Usage" in ended.stdout + ended.stderr


def test_no_memory_is_one_line_with_what_to_change(here: Path) -> None:
    """An activation of terabytes, weights of terabytes, and what a library says that has none left."""
    def complaint(*overrides: str) -> str:
        status, output = run(*overrides)
        assert status == 1, output
        (line,) = (line for line in output.splitlines() if line.startswith("moescale: "))
        return line

    line = complaint("feed_forward.d_ff=100000000000", "model.pattern={channel_mixer: feed_forward}", "run.dir=wide")
    assert "iB" in line
    assert "parallel.recompute=full" in line
    assert "data.seq_len" in line
    line = complaint("moe.d_ff=100000000000", "parallel.recompute=full", "run.dir=many")
    assert "recompute" not in line.partition(": write ")[2], "what is done already is no advice"


@pytest.mark.parametrize(("error", "asked"), [
    (MemoryError(), "more than"),
    (MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000,)"), "7.28 TiB"),
    (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity"), "20.00 GiB"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes."), "1.00 GiB"),
    (OSError(12, "Cannot allocate memory"), "more than"), (RuntimeError("mat1 and mat2 cannot be multiplied"), None),
    (ValueError("out of memory"), None),
])
def test_what_memory_was_asked_for(error: Exception, asked: str | None) -> None:
    found = memory_asked(error)
    assert (found is None) == (asked is None)
    assert asked is None or asked in str(found)


def test_time_memory_and_damaged_ends_of_metrics(here: Path) -> None:
    """Bytes that are no text, half a line and lines of steps to be done again: the run goes on, the report is drawn."""
    assert run("run.steps=6", "checkpoint.every=3", "monitor.every=1")[0] == 0
    metrics = here / "run/metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    figures = [json.loads(line) for line in lines]
    assert all(abs(line["time"] - time.time()) < 600 for line in figures)
    assert all(0 < early["seconds"] < late["seconds"] for early, late in pairwise(figures))
    assert all(1e7 < line["memory_bytes"] < 1e12 for line in figures)
    ends = (b"\xff\xfe\x00half", lines[0][:50], b"[" * 100_000 + b"\n" + b"\x00" * 4096,
            b'{"step": null}\n{"step": 1e999}\n' + '{"step": "é"}\n'.encode("latin1"))
    for number, end in enumerate(ends):
        metrics.write_bytes(b"".join(lines) + end)
        result = CliRunner().invoke(app, ["report", "run", "--terminal"])
        assert result.exit_code == 0, (end[:20], result.output)
        assert run(f"run.steps={7 + number}", "checkpoint.every=100", "monitor.every=1")[0] == 0
        after = metrics.read_bytes()
        assert [json.loads(line)["step"] for line in after.splitlines()] == list(range(1, 8 + number)), end[:20]
        assert after.startswith(b"".join(lines)), "whole lines stay as they are"
        lines = after.splitlines(keepends=True)
