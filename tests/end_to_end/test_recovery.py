"""Ranks and hosts that are killed under a real torchrun: the run goes on from the newest step that memory holds."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from moescale.cli import app
from moescale.engine.native import NativeEngine
from tests.support.command_line import TINY
from tests.support.launched import end, forked_for, launch, losses, ranks_of, wait_for_steps
from tests.support.ports import free_port, wait_until_open

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


def test_a_run_that_broke_off_goes_on_from_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(run: str, *words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["train", str(folder / "tiny.yaml"), f"run.dir={folder / run}", "run.steps=12",
                                          *words])
        return result.exit_code, result.output

    def fail(engine: NativeEngine, guard: torch.Tensor | None = None) -> torch.Tensor:
        if engine.step_count == 8:
            raise RuntimeError("the machine failed")
        return real(engine, guard)

    assert start("undisturbed")[0] == 0
    real = NativeEngine.step
    monkeypatch.setattr(NativeEngine, "step", fail)
    assert start("broken", "checkpoint.in_memory=3", "checkpoint.every=5")[0] == 1
    monkeypatch.setattr(NativeEngine, "step", real)
    (copy,) = (folder / "memory").glob("*/*/*")
    assert copy.name == "step_00000006"
    assert sorted(path.name for path in (folder / "broken/checkpoints").iterdir()) == ["step_00000005"]
    status, output = start("broken", "checkpoint.in_memory=3", "checkpoint.every=5")
    assert status == 0, output
    assert brought_back(output) == 6
    assert losses(folder / "broken") == losses(folder / "undisturbed")
    assert not list((folder / "memory").iterdir()), "nothing is left behind"


def test_copies_of_a_course_that_was_given_up_are_not_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a spike the run goes back, and breaks off before the next copy."""
    def fail(engine: NativeEngine, guard: torch.Tensor | None = None) -> torch.Tensor:
        norm = real(engine, guard)
        if engine.step_count == 8 and "seen" not in broken:
            broken["seen"] = True
            return norm * math.nan
        if engine.step_count == 6 and "seen" in broken:
            raise RuntimeError("the machine failed")
        return norm

    broken, real = dict[str, bool](), NativeEngine.step
    monkeypatch.setattr(NativeEngine, "step", fail)
    words = ["train", str(folder / "tiny.yaml"), f"run.dir={folder / 'gone_back'}", "run.steps=12",
             "checkpoint.every=5", "checkpoint.in_memory=7", "spikes.deviations=9", "spikes.back=2", "spikes.skip=1"]
    assert CliRunner().invoke(app, words).exit_code == 1
    assert broken
    assert not list((folder / "memory").rglob("step_*"))
    shutil.rmtree(folder / "memory")
    (folder / "memory").mkdir()


@pytest.mark.slow
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
    """Start the agent of one of the pretended hosts; the first keeps the rendezvous."""
    meeting = ("--nnodes", f"{hosts}", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id",
               run, "--rdzv-conf", "keep_alive_interval=1", "--local-addr", "127.0.0.1")
    return launch(folder, run, *WORDS, "checkpoint.in_memory=1", restarts=3, ranks=per_host, launcher=meeting,
                  agent="moescale.cluster.agent")


@pytest.mark.slow
@pytest.mark.parametrize("per_host", [1, 2])
def test_a_host_that_is_lost_takes_no_step_along(folder: Path, per_host: int) -> None:
    whole = launch(folder, f"whole_{per_host}", *WORDS, ranks=2 * per_host)
    output = end(whole)
    assert whole.returncode == 0, output
    run = f"lost_{per_host}"
    port = free_port()
    agents = [start_agents(folder, run, per_host, port, 2, 0)]
    try:
        wait_until_open(port)  # whoever comes first keeps the store
        agents.append(start_agents(folder, run, per_host, port, 2, 1))
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


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["torch.distributed.run", "moescale.cluster.agent"])
def test_a_spare_takes_a_killed_ranks_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    words = (*(word for word in WORDS if "steps" not in word), "run.steps=100000", "checkpoint.in_memory=1", "--warm")
    run = folder / f"spared_by_{agent}"
    launcher = launch(folder, run.name, *words, restarts=2, agent=agent)
    try:
        wait_for_steps(launcher, run, 10)
        deadline = time.monotonic() + 90
        while len(list(tmp_path.glob("moescale-spares-*/*"))) < 2:
            assert time.monotonic() < deadline, "no spares"
            time.sleep(0.1)
        for victim in (1, 0):
            before = len(losses(run))
            first = ranks_of(launcher)  # what the launcher started; then the rank that was forked for one of them
            os.kill(first[victim] if victim == 1 else forked_for(victim, tmp_path, first), signal.SIGKILL)
            killed = time.monotonic()
            wait_for_steps(launcher, run, before + 20)
            print(f"20 steps more {time.monotonic() - killed:.1f} s after rank {victim} was killed")
            for rank in ranks_of(launcher):
                assert "libtorch" not in Path(f"/proc/{rank}/maps").read_text(), "it imported torch itself"
        ours = agent.startswith("moescale")
        os.kill(launcher.pid if ours else ranks_of(launcher)[1], signal.SIGUSR1)
        output = end(launcher)
    finally:
        launcher.kill()
    if ours:
        assert launcher.returncode == 75
        for victim in (1, 0):
            assert output.count(f"rank {victim} on {socket.gethostname()} was killed by SIGKILL") == 1, output
    assert output.count("was brought back from the memory") == 2, output
    assert "stopped by SIGUSR1" in output
    steps = [step for step, _ in losses(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert (run / f"checkpoints/step_{steps[-1]:08d}").exists()
    deadline = time.monotonic() + 10
    while list(tmp_path.glob("moescale-spares-*/*")):
        assert time.monotonic() < deadline, "spares live on"
        time.sleep(0.1)


@pytest.mark.slow
def test_fewer_ranks_and_more_go_on_with_the_same_losses(folder: Path) -> None:
    """Four ranks on two hosts, then two on one, then four again."""
    words = ("parallel.ep=4", "parallel.tp=2", "parallel.elastic=true", f"run.steps={3 * STEPS}")
    whole = launch(folder, "whole_elastic", *WORDS, *words, ranks=4)
    output = end(whole)
    assert whole.returncode == 0, output
    run = folder / "elastic"
    port = free_port()

    def start(which: int) -> subprocess.Popen:
        meeting = ("--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id",
                   "elastic", "--rdzv-conf", "keep_alive_interval=1,last_call_timeout=5",
                   "--local-addr", "127.0.0.1")
        return launch(folder, "elastic", *WORDS, "checkpoint.in_memory=1", *words, restarts=5, launcher=meeting,
                      agent="moescale.cluster.agent")

    agents = [start(0)]
    try:
        wait_until_open(port)  # whoever comes first keeps the store
        agents.append(start(1))
        wait_for_steps(agents[0], run, 20)
        for process in (*ranks_of(agents[1]), agents[1].pid):
            os.kill(process, signal.SIGKILL)
        lost = time.monotonic()
        wait_for_steps(agents[0], run, len(losses(run)) + 10)
        print(f"10 steps on two ranks {time.monotonic() - lost:.1f} s after two of four were lost")
        agents.append(start(1))
        outputs = [end(agent) for agent in (agents[0], agents[2])]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert agents[0].returncode == agents[2].returncode == 0, outputs
    said = "".join(outputs)
    for ranks in ("4 ranks (tp 2, dp_shard 2, ep 4)", "2 ranks (tp 2, ep 2)"):
        assert ranks.split(" (")[0] in said, said
    found, expected = losses(run), losses(folder / "whole_elastic")
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-5)
