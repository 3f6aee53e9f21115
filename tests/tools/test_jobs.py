"""Jobs on several hosts compute what one process computes, whatever happens to their hosts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.command_line import ROOT


def run(script: str, *words: str) -> None:
    """Run one of the tools, which says what is wrong and ends with another status than 0."""
    command = [sys.executable, str(ROOT / "tools" / script), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_losses_across_hosts_equal_those_of_one_process() -> None:
    run("across_hosts.py", "--layouts", "2x1:ep=2", "2x1:tp=2", "2x1:pp=2", "2x1:dp_replicate=2")


def test_a_run_that_is_disturbed_ends_like_a_quiet_one() -> None:
    """A short soak of two ranks: one is killed, then their agent is asked to leave and started again."""
    disturb("1x2", "--faults", "2", "--steps", "40", "--seed", "3", "--kinds", "rank_killed", "preempted")


@pytest.mark.slow
def test_so_does_one_that_loses_a_host() -> None:
    disturb("2x1", "--faults", "3", "--steps", "60", "--kinds", "rank_killed", "host_lost", "preempted")


def disturb(shape: str, *words: str) -> None:
    run("soak.py", "--shape", shape, *words)
