"""A spare forks the ranks that a launcher starts again: with their streams, environment, signals and status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support.command_line import ROOT, TINY
from tests.support.launched import forked_for


def start(folder: Path, run: str, *words: str, **environment: str) -> subprocess.Popen:
    """Start what torchrun would: this process stands for it."""
    command = [sys.executable, "-m", "moescale", "train", "tiny.yaml", f"run.dir={run}", "run.steps=100000",
               "--warm", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(folder), "TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **environment})


def wait_until(what: str, holds: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="spares need pidfd")
def test_a_spare_runs_the_next_rank(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / f"text/{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    first = start(tmp_path, "first", "run.seed=none")  # ends at once with a mistake, and leaves a spare
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 2, output
    wait_until("a spare", lambda: list(tmp_path.glob("moescale-spares-*/*")))
    (tmp_path / "wall").mkdir()  # what the spare has imported cannot be imported again
    (tmp_path / "wall/typer.py").write_text("raise ImportError('a new process imported typer')")
    wall = {"PYTHONPATH": f"{tmp_path}/wall:{ROOT}"}

    stopped = start(tmp_path, "stopped", **wall)
    figures = tmp_path / "stopped/metrics.jsonl"
    wait_until("steps", figures.exists)
    stopped.send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=30)[0]
    assert stopped.returncode == 75, output
    assert "stopped by SIGTERM" in output

    killed = start(tmp_path, "killed", **wall)
    wait_until("steps", (tmp_path / "killed/metrics.jsonl").exists)
    killed.kill()
    killed.wait()
    again = start(tmp_path, "killed", **wall)  # waits until the one before has let go of the directory
    wait_until("another rank", lambda: "M parameters" in again.stdout.readline())
    os.kill(forked_for(0, tmp_path, [again.pid]), signal.SIGKILL)
    output = again.communicate(timeout=30)[0]
    assert again.returncode == -signal.SIGKILL, "as its rank"
    assert "Traceback" not in output
    assert list(tmp_path.glob("moescale-spares-*/*")), "it waits as long as its launcher lives"
    wait_until("the spare alone", lambda: len(started_in(tmp_path)) == 1, 10)
    for spare in started_in(tmp_path):  # whose launcher, this very process, lives on
        os.kill(spare, signal.SIGKILL)


def started_in(folder: Path) -> list[int]:
    """Find the processes that were started with this folder in their environment."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()
            and f"TMPDIR={folder}".encode() in read(entry / "environ")]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_without_torchrun_it_is_refused() -> None:
    result = subprocess.run([sys.executable, "-m", "moescale", "train", "x.yaml", "--warm"], capture_output=True,
                            text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 2
    assert "leave it out, or start with torchrun" in result.stderr
