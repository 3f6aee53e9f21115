"""`moescale doctor` says a line for each check, and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from moescale import doctor
from moescale.cli import app
from moescale.config import load_config
from moescale.doctor import examine, judge_links
from moescale.parallel.ranks import run_ranks
from tests.support.command_line import TINY
from tests.support.saved import flip, save


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "DISK_BYTES", 2**20)
    monkeypatch.setattr(doctor, "LINK_BYTES", 2**16)
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / f"text/{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "run": {"steps": 4, "dir": "run"}}))
    return tmp_path


def checks(lines: list[str]) -> list[tuple[str, str]]:
    return [(line[:4].strip(), line[6:].partition(":")[0]) for line in lines if not line.startswith("   ")]


def test_one_process_is_examined_and_nothing_is_left(here: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "tiny.yaml"])
    assert result.exit_code == 0, result.output
    found = checks(result.output.splitlines())
    assert [check for _, check in found] == [
        "ranks", "sameness", "packages", "run.dir", "devices", "memory", "disk", "disk speed", "text", "network"]
    assert {level for level, _ in found} == {"ok"}
    assert not (here / "run").exists()
    (here / "text/0.txt").unlink()
    result = CliRunner().invoke(app, ["doctor", "tiny.yaml", "data.files=[none/*.txt]", "parallel.tp=2"])
    assert result.exit_code == 2
    assert result.output.startswith("fail  ranks: parallel.tp=2 is 2 ranks")


@pytest.mark.parametrize(("word", "check", "said"), [
    ("checkpoint.url=none://bucket/run", "packages", "checkpoint.url=none://bucket/run cannot be used"),
    ("data.max_epochs=0.001", "text", "write data.max_epochs="),
    ("checkpoint.memory_dir=none", "copies", "checkpoint.memory_dir=none cannot be used"),
])
def test_what_a_run_would_refuse_before_its_first_step_fails(here: Path, word: str, check: str, said: str) -> None:
    result = CliRunner().invoke(app, ["doctor", "tiny.yaml", "checkpoint.in_memory=1", word])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("fail")]
    assert line.startswith(f"fail  {check}: ")
    assert said in line


def test_nothing_is_changed(here: Path) -> None:
    """Neither a damaged checkpoint nor a folder of copies, and nothing new is left."""
    (here / "memory").mkdir()
    for step in (5, 10):
        save(here / "run", step, keep=9)
    flip(here / "run/checkpoints/step_00000010/__0_0.distcp")

    def there() -> list[Path]:
        return sorted(path for folder in ("run", "memory") for path in (here / folder).rglob("*"))

    before = there()
    words = ["checkpoint.in_memory=1", "checkpoint.memory_dir=memory"]
    output = CliRunner().invoke(app, ["doctor", "tiny.yaml", *words]).output
    assert "warn  run.dir: step_00000010 is damaged: __0_0.distcp was altered; a run keeps it as " in output
    assert "ok    copies: every host can keep them in checkpoint.memory_dir=memory" in output
    assert there() == before


def test_the_step_that_lies_in_a_storage_is_said(here: Path) -> None:
    save(here / "away", 5, keep=9)
    output = CliRunner().invoke(app, ["doctor", "tiny.yaml", f"checkpoint.url=file://{here}/away/checkpoints"]).output
    assert f"where a run would begin with step 5 of file://{here}/away/checkpoints" in output


def on_ranks(place: Path, words: list[list[str]]) -> tuple[bool, list[str]]:
    from moescale.cluster.launch import read_launch

    lines: list[str] = []
    rank = read_launch().rank
    return examine(lambda: load_config(place / "tiny.yaml", words[rank]), lines.append), lines


def test_ranks_are_examined_together(here: Path) -> None:
    (passed, lines), *others = run_ranks(4, on_ranks, here, [["parallel.ep=2"]] * 4, timeout_seconds=60)
    assert passed, lines
    assert others == [(True, [])] * 3, "rank 0 speaks"
    found = checks(lines)
    assert [check for _, check in found].count("network") == 2
    assert ("ok", "clocks") in found
    assert any("efsdp 2" in line for line in lines)


def test_what_fails_is_said_and_the_other_checks_go_on(here: Path) -> None:
    words = [["optim.lr=0.5", "data.files=[none/*.txt]"], ["optim.lr=0.25", "data.files=[none/*.txt]"]]
    results: list[Any] = run_ranks(2, on_ranks, here, words, timeout_seconds=60)
    assert [passed for passed, _ in results] == [False, False]
    found = checks(results[0][1])
    assert [check for level, check in found if level == "fail"] == ["sameness", "text"]
    assert ("ok", "network") in found
    assert any("optim.lr is 0.5 on rank 0" in line for line in results[0][1])


def on_ranks_that_cannot_connect(place: Path, blocked: list[int]) -> tuple[bool, list[str]]:
    """Let ranks fail where they connect; the others connect to nobody, and find out by themselves."""
    from moescale.cluster.launch import read_launch

    rank = read_launch().rank
    if rank in blocked:
        os.environ["GLOO_SOCKET_IFNAME"] = "absent"  # gloo fails in earnest
    return on_ranks(place, [["run.timeout_seconds=3"]] * 2)


@pytest.mark.parametrize("blocked", [[0, 1], [1]])
def test_ranks_that_cannot_connect_fail_the_check_on_each_rank(here: Path, blocked: list[int]) -> None:
    (passed, lines), (other, _) = run_ranks(2, on_ranks_that_cannot_connect, here, blocked, timeout_seconds=60)
    assert not passed
    assert not other
    (line,) = [line for line in lines if line.startswith("fail")]
    assert line.startswith("fail  network: ")
    assert "ranks cannot exchange tensors" in line
    assert "open all ports between the nodes" in line


def test_a_slow_link_is_named() -> None:
    hosts = ["a", "a", "b", "b"]
    inside, between = judge_links([4e9, 1e9, 4e9, 0.1e9], hosts)
    assert (inside.level, between.level) == ("ok", "warn")
    assert "the slowest rank 3 (b) to rank 0 (a) 100.0 MB/s: look at that link" in between.text
    assert [found.level for found in judge_links([4e9] * 4, ["a"] * 4)] == ["ok"]
