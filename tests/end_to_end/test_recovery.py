"""Ranks and hosts that are killed under a real torchrun: the run goes on from the newest step that memory holds."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.support.command_line import TINY
from tests.support.launched import end, launch, losses, ranks_of, wait_for_steps

STEPS = 40
WORDS = ("parallel.ep=2", "data.seq_len=128", "monitor.eval_sequences=1", f"run.steps={STEPS}",
         "run.timeout_seconds=60")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and a configuration, and a place for copies in memory."""
    folder = tmp_path_factory.mktemp("recovery")
    for name in ("text", "memory"):
        (folder / name).mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    data = {**TINY["data"], "files": [f"{folder}/text/*.txt"], "cache_dir": str(folder / "cache"), "micro_batch": 1}
    config = {**TINY, "data": data, "monitor": {**TINY["monitor"], "moved_every": None},
              "checkpoint": {"every": 1000, "keep": 3, "memory_dir": str(folder / "memory")}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def brought_back(output: str) -> int:
    (line,) = (line for line in output.splitlines() if "was brought back from the memory" in line)
    return int(line.split()[1])


def test_a_killed_rank_goes_on_from_memory(folder: Path) -> None:
    whole = launch(folder, "whole", *WORDS)
    killed = launch(folder, "killed", *WORDS, "checkpoint.in_memory=1", restarts=1)
    wait_for_steps(killed, folder / "killed", 10)
    os.kill(ranks_of(killed)[1], signal.SIGKILL)
    before = losses(folder / "killed")
    output = end(killed)
    assert killed.returncode == 0, output
    assert brought_back(output) >= len(before) - 2, "the last copy may have been under way"
    end(whole)
    assert losses(folder / "killed") == losses(folder / "whole")
    assert not list((folder / "memory").iterdir()), "nothing is left behind"


def start_agents(folder: Path, run: str, per_host: int, port: int, hosts: int, which: int) -> subprocess.Popen:
    """Start the agent of one of the pretended hosts; host 0 keeps the rendezvous."""
    meeting = ("--nnodes", f"{hosts}", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id",
               run, "--rdzv-conf", f"is_host={int(which == 0)}", "--local-addr", "127.0.0.1")
    return launch(folder, run, *WORDS, "checkpoint.in_memory=1", restarts=3, ranks=per_host, launcher=meeting)


@pytest.mark.slow
@pytest.mark.parametrize("per_host", [1, 2])
def test_a_host_that_is_lost_takes_no_step_along(folder: Path, per_host: int) -> None:
    whole = launch(folder, f"whole_{per_host}", *WORDS, ranks=2 * per_host)
    output = end(whole)
    assert whole.returncode == 0, output
    run = f"lost_{per_host}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = [start_agents(folder, run, per_host, port, 2, which) for which in (0, 1)]
    try:
        wait_for_steps(agents[0], folder / run, 20)
        victims = ranks_of(agents[1])
        environment = Path(f"/proc/{victims[0]}/environ").read_bytes().decode().split("\0")
        (node,) = (word.partition("=")[2] for word in environment if word.startswith("GROUP_RANK="))
        for process in (*victims, agents[1].pid):
            os.kill(process, signal.SIGKILL)
        lost = time.monotonic()
        before = losses(folder / run)
        (place,) = (folder / "memory").glob(f"*/{socket.gethostname()}-{node}")
        shutil.rmtree(place)
        agents.append(start_agents(folder, run, per_host, port, 2, 1))
        outputs = [end(agent) for agent in (agents[0], agents[2])]
        assert agents[0].returncode == agents[2].returncode == 0, outputs
        said = outputs[0] + outputs[1]
        assert brought_back(said) >= len(before) - 2
        assert losses(folder / run) == losses(folder / f"whole_{per_host}")
        print(f"{len(before)} steps before, {brought_back(said)} brought back, "
              f"{time.monotonic() - lost:.1f} s to the end")
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
