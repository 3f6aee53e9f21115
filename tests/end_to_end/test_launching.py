"""Two nodes, as launch/torchrun.sh starts them, on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.support.command_line import ROOT, TINY
from tests.support.ports import free_port


def start_node(folder: Path, port: int) -> subprocess.Popen:
    environment = {
        **os.environ, "NODES": "2", "RANKS": "1", "HEAD": f"127.0.0.1:{port}", "ADDRESS": "127.0.0.1", "JOB": "two",
        "PYTHON": sys.executable, "MOESCALE_SECRET": "of this test", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [str(ROOT / "launch/torchrun.sh"), "tiny.yaml", "run.dir=run", "run.steps=100000", "parallel.ep=2"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def test_two_nodes_meet_and_leave_with_one_status_when_one_is_asked_to(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / f"text/{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "checkpoint": {"every": 1000}}))
    port = free_port()
    nodes = [start_node(tmp_path, port) for _ in range(2)]
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "run/metrics.jsonl").exists():
            assert time.monotonic() < deadline, "no steps"
            assert all(node.poll() is None for node in nodes), [node.communicate()[0] for node in nodes]
            time.sleep(0.05)
        nodes[1].send_signal(signal.SIGUSR1)
        outputs = [node.communicate(timeout=60)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [75, 75], outputs
    assert "".join(outputs).count("moescale: ") == 1, outputs
    assert "".join(outputs).count("stopped by SIGUSR1 after step") == 1
    assert "Traceback" not in "".join(outputs)
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1
