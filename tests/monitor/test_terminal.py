"""The terminal is a view of the run: a run is never lost for it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moescale.monitor.terminal import Terminal
from tests.support.command_line import ROOT, TINY

FIGURES = {"loss": 1.0, "tokens": 10, "tokens_per_second": 5.0}


def show(stream: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    terminal = Terminal(0, 3, lambda step: 10 * (3 - step))
    for step in (1, 2, 3):
        terminal.write(step, {**FIGURES, "loss": 1.0 / step})
    terminal.say("an arrow → and a letter ł")
    terminal.summarize()
    terminal.close()


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_an_output_that_takes_nothing_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    show(Full(), monkeypatch)
    closed = io.StringIO()
    closed.close()
    show(closed, monkeypatch)


def test_what_a_terminal_cannot_show_is_left_out_and_the_rest_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = io.BytesIO()
    show(io.TextIOWrapper(seen, encoding="ascii", write_through=True), monkeypatch)
    assert b"step 3/3  loss 0.3333" in seen.getvalue()
    assert b"an arrow ? and a letter ?" in seen.getvalue()


def test_a_standard_output_that_is_closed_or_full_ends_well(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    (tmp_path / "b.txt").write_text("the lazy dog sleeps. " * 50)
    config = {**TINY, "run": {"steps": 2}, "optim": {}, "data": {**TINY["data"], "files": [f"{tmp_path}/*.txt"],
                                                    "cache_dir": str(tmp_path / "cache")}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    command = f"{sys.executable} -m moescale train {tmp_path}/tiny.yaml run.dir={tmp_path}"
    script = f"{command}/closed >&- & first=$!; {command}/full >/dev/full; full=$?; wait $first; echo $? $full"
    ended = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stdout.split() == ["0", "0"], ended.stderr
    assert "Traceback" not in ended.stderr
    for run in ("closed", "full"):
        assert len((tmp_path / run / "metrics.jsonl").read_text().splitlines()) == 2
