"""The agent of a node: what it passes on, what it says for ranks that cannot, and with which status it leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescale.cluster import agent
from tests.support.agents import Node
from tests.support.ports import free_port, wait_until_open


@pytest.mark.parametrize(("act", "words"), [
    ("SIGSEGV", "crashed in native code (SIGSEGV)"), ("SIGKILL", "was killed by SIGKILL"),
])
def test_a_rank_that_cannot_speak_is_spoken_for_once(tmp_path: Path, act: str, words: str) -> None:
    node = Node(tmp_path, act)
    assert node.end() == 1
    assert node.said == [f"moescale: rank 1 on {socket.gethostname()} {words}"]


def count_one_more_each_time() -> None:
    counts = iter(range(10))
    agent._count_kills = lambda: next(counts)


def test_a_rank_that_the_kernel_killed_for_memory_is_named_so(tmp_path: Path) -> None:
    node = Node(tmp_path, "SIGKILL", before=count_one_more_each_time)
    assert node.end() == 1
    assert node.said == [f"moescale: rank 1 on {socket.gethostname()} was killed by the kernel, because memory ran out "
                         "(SIGKILL)"]


@pytest.mark.parametrize("status", [0, 2, 75, 130])
def test_ranks_that_left_for_good_are_not_started_again_and_their_status_is_the_agents(
    tmp_path: Path, status: int
) -> None:
    node = Node(tmp_path, str(status), restarts=3)
    assert node.end() == status
    assert node.starts == 1
    assert node.said == []


def test_ranks_that_failed_are_started_again(tmp_path: Path) -> None:
    node = Node(tmp_path, "1", restarts=1)
    assert node.end() == 1
    assert node.starts == 2
    first, last = node.said
    assert "all ranks are started again, 1 of at most 1 times" in first
    assert "goes on from the last checkpoint" in last


def test_the_status_is_that_of_the_ranks_that_were_started_last(tmp_path: Path) -> None:
    node = Node(tmp_path, "once", restarts=1)
    assert node.end() == 0
    assert node.starts == 2


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_go_on_to_the_ranks_which_may_finish(tmp_path: Path, number: signal.Signals) -> None:
    node = Node(tmp_path, "wait", restarts=3)
    node.wait_for_ranks()
    assert node.process.pid is not None
    os.kill(node.process.pid, number)
    assert node.end() == 75
    assert node.starts == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)],
                         ids=str)
def test_ranks_that_a_signal_ends_while_they_start_were_asked_to_leave(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    node = Node(tmp_path, "importing", restarts=3)
    node.wait_for_ranks()
    assert node.process.pid is not None
    os.kill(node.process.pid, number)
    assert node.end() == status
    assert node.starts == 1
    assert node.said == [f"moescale: {socket.gethostname()}: stopped by {number.name} while ranks were starting"]


def test_a_signal_that_comes_between_the_starts_of_two_ranks_reaches_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signal_in_between() -> None:
        start = subprocess.Popen.__init__

        def start_and_signal(process: Any, *words: Any, **options: Any) -> None:
            start(process, *words, **options)
            if options["env"]["LOCAL_RANK"] == "0":
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(subprocess.Popen, "__init__", start_and_signal)

    node = Node(tmp_path, "importing", before=signal_in_between)
    assert node.end() == 75
    assert node.said == [f"moescale: {socket.gethostname()}: stopped by SIGTERM while ranks were starting"]


def test_a_hang_up_is_ignored_after_nohup_by_the_agent_and_its_ranks(tmp_path: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    node = Node(tmp_path, "nohup", before=ignore)
    node.wait_for_ranks()
    assert node.process.pid is not None
    os.kill(node.process.pid, signal.SIGHUP)
    os.kill(node.process.pid, signal.SIGUSR1)
    assert node.end() == 0, node.said


def test_an_agent_that_waits_for_other_nodes_leaves_when_asked_to(tmp_path: Path) -> None:
    def wait_for_two() -> None:
        sys.argv[1:1] = ["--nnodes", "2"]

    node = Node(tmp_path, "0", before=wait_for_two)
    time.sleep(1.0)
    assert node.process.pid is not None
    os.kill(node.process.pid, signal.SIGTERM)
    assert node.end() == 75
    assert "stopped by SIGTERM before ranks were started" in node.said[0]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=str)
def test_an_agent_that_looks_for_the_first_node_leaves_when_asked_to(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    def look_elsewhere() -> None:
        sys.argv[sys.argv.index("--rdzv-endpoint") + 1] = "192.0.2.1:29500"  # nobody's

    node = Node(tmp_path, "0", before=look_elsewhere)
    time.sleep(1.0)
    assert node.process.pid is not None
    os.kill(node.process.pid, number)
    assert node.end() == status
    assert node.said == [f"moescale: {socket.gethostname()}: stopped by {number.name} before ranks were started"]


@pytest.mark.parametrize(("option", "value", "words"), [
    ("--nnodes", "4x", "NODES=4x (--nnodes) is no number of nodes: write one from 1, or MIN:MAX"),
    ("--nnodes", "4:2", "NODES=4:2 (--nnodes) is no number of nodes: write one from 1, or MIN:MAX"),
    ("--nproc-per-node", "two", "RANKS=two (--nproc-per-node) is no number of ranks: write how many this node has"),
    ("--nproc-per-node", "0", "RANKS=0 (--nproc-per-node) is no number of ranks: write how many this node has"),
    ("--max-restarts", "-1", "an option of torchrun cannot be taken: max_restarts must be >= 0"),
    ("--max-restarts", "few", "an option of torchrun cannot be taken: argument --max-restarts/--max_restarts: invalid "
                              "int value: 'few'"),
])
def test_numbers_that_are_none_are_refused_for_good(
    capfd: pytest.CaptureFixture[str], option: str, value: str, words: str
) -> None:
    assert agent.run(["--rdzv-endpoint", "localhost:0", f"{option}={value}", "rank.py"]) == 2
    assert capfd.readouterr().err == f"moescale: {words}\n"


def be_elastic(port: int) -> Callable[[], None]:
    """Return what makes an agent one of one or two nodes that meet there."""
    def change() -> None:
        agent.CHANGE_SECONDS = 1.0
        sys.argv[sys.argv.index("--rdzv-endpoint") + 1] = f"127.0.0.1:{port}"
        sys.argv[1:1] = ["--nnodes", "1:2", "--rdzv-conf", "last_call_timeout=1"]

    return change


def test_ranks_of_an_elastic_job_that_ended_as_asked_are_not_started_again(tmp_path: Path) -> None:
    node = Node(tmp_path, "75", restarts=3, before=be_elastic(free_port()))
    assert node.end() == 75
    assert node.starts == 1
    assert node.said == []


def test_an_elastic_job_goes_on_without_a_node_that_was_asked_to_leave(tmp_path: Path) -> None:
    port = free_port()
    nodes = []
    for name in ("stays", "leaves"):
        (tmp_path / name).mkdir()
        nodes.append(Node(tmp_path / name, "wait", before=be_elastic(port)))  # no restarts: this is none
        wait_until_open(port)
    for node in nodes:
        node.wait_for_ranks()
    stays, leaves = (node.process.pid for node in nodes)
    assert stays is not None
    assert leaves is not None
    ranks = [int(each) for each in Path(f"/proc/{stays}/task/{stays}/children").read_text().split()]
    os.kill(leaves, signal.SIGTERM)
    for rank in ranks:  # which hear of it from the others
        os.kill(rank, signal.SIGUSR1)
    assert nodes[1].end() == 75
    nodes[0].wait_for_ranks(starts=2)
    os.kill(stays, signal.SIGTERM)
    assert nodes[0].end() == 75
    first = f"moescale: {socket.gethostname()}: nodes came or went, and all ranks are started again"
    assert nodes[0].said in ([], [first])
