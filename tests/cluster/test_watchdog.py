"""A rank that hangs shows where, and ends at the time-out whatever it hangs in."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from moescale.cluster import watcher
from moescale.cluster.watcher import Limits, Pace, Watcher, where
from tests.support.hangs import LIMITS, python


def test_what_counts_as_a_hang() -> None:
    pace = Pace(Limits(times=10, floor_seconds=5, timeout_seconds=60, grace_seconds=5), 0.0)

    def alive_until(now: float) -> None:
        pace.hear("alive", now)

    pace.hear("step 1", 0.0)
    alive_until(1000.0)
    assert not pace.hangs(1000.0), "the first steps compile"
    assert not pace.is_over(1000.0)
    for step in range(2, 9):
        pace.hear(f"step {step}", 1000.0 + step)
    assert pace.usual == 1.0
    alive_until(1500.0)
    assert not pace.hangs(1008 + 9.9)
    assert pace.hangs(1008 + 10.1)
    assert not pace.is_over(1008 + 65.9)
    assert pace.is_over(1008 + 66.1)
    pace.hear("pause evaluation", 1500.0)
    alive_until(2000.0)
    assert not pace.hangs(2000.0)
    assert not pace.is_over(2000.0)
    assert pace.hangs(2000.0 + 31), "silence is a hang in any case"
    assert pace.is_over(2000.0 + 66)
    pace.shift(50.0)
    assert not pace.is_over(2000.0 + 66), "nobody could run in that time"
    pace.hear("step 9", 2100.0)
    assert pace.usual == 1.0, "a pause is no step"
    alive_until(2110.0)
    pace.shift(500.0)
    assert not pace.hangs(2609.9), "the step has not taken that time"
    assert pace.hangs(2610.1)
    assert not pace.is_over(2665.9)
    assert pace.is_over(2666.1)


class FakeTime:
    """A clock, and what a watcher hears: each look takes some seconds and brings some text, or none."""

    def __init__(self, looks: list[tuple[float, str]]) -> None:
        self.now, self.looks, self.heard = 0.0, iter(looks), ""

    def monotonic(self) -> float:
        return self.now

    def select(self, *_: object) -> tuple[list[int], list[int], list[int]]:
        seconds, self.heard = next(self.looks)
        self.now += seconds
        return [0] if self.heard else [], [], []

    def read(self, *_: object) -> bytes:
        return self.heard.removeprefix("END").encode()


@pytest.mark.parametrize(("late", "over"), [(0.5, True), (100.0, False)])
def test_a_machine_that_stood_still_is_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: float, over: bool
) -> None:
    looks = [(1.0, f"step {step}\n") for step in range(1, 9)]
    looks += [(late, "alive\n")] * round(100 / late) + [(0.1, "END")]
    fake, ended = FakeTime(looks), list[bool]()
    monkeypatch.setattr(watcher.time, "monotonic", fake.monotonic)
    monkeypatch.setattr(watcher.select, "select", fake.select)
    monkeypatch.setattr(watcher.os, "read", fake.read)
    monkeypatch.setattr(Watcher, "_tell", lambda *_: None)
    monkeypatch.setattr(Watcher, "_end", lambda *_: ended.append(True))
    Watcher(0, "here", tmp_path, 0, Limits(times=10, floor_seconds=5, timeout_seconds=60, grace_seconds=5)).watch()
    assert ended == [True] * over


def test_a_process_that_has_the_id_of_a_rank_that_has_ended_is_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stacks, _ = os.pipe()
    with subprocess.Popen(["sleep", "20"]) as other:
        watching = Watcher(0, "here", tmp_path, stacks, LIMITS)
        watching.pid = other.pid
        watching._tell(1.0)
        watching._end(1.0)
        time.sleep(0.1)
        assert other.poll() is None
        other.kill()
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_the_main_thread_is_found_in_stacks() -> None:
    stacks = ('Thread 0x1 (most recent call first):\n  File "/a/moescale/cluster/agreement.py", line 5 in _beat\n\n'
              'Current thread 0x2 (most recent call first):\n  File "/b/torch/distributed.py", line 7 in wait\n'
              '  File "/a/moescale/comm/exchange.py", line 42 in finish\n')
    assert where(stacks) == "comm/exchange.py:42 in finish"
    assert where("") == ""


def test_a_rank_that_hangs_is_shown_and_killed(tmp_path: Path) -> None:
    cases = [("wait_with_the_lock", False, "waiting"), ("wait_without_the_lock", False, "waiting"),
             ("wait_for_ever", False, "waiting"), ("be_stopped", False, "stopped by a signal"),
             ("be_stopped", True, "stopped by a signal")]
    ranks = [python(f"hang({str(tmp_path / str(number))!r}, {how!r}, {pause})")
             for number, (how, pause, _) in enumerate(cases)]
    for number, (rank, (how, pause, state)) in enumerate(zip(ranks, cases, strict=True)):
        _, said = rank.communicate(timeout=60)
        assert rank.returncode == -signal.SIGKILL, said
        what = "evaluation" if pause else "step 8"
        first, last = said.splitlines()
        assert first.startswith(f"moescale: {what} has taken"), first
        assert last.startswith(f"moescale: rank 0 on here: {what} did not end within run.timeout_seconds=1.5 ("
                               f"{state})"), last
        report = (tmp_path / str(number) / "stacks" / what.replace(" ", "_") / "rank_0.txt").read_text()
        assert state in report
        assert how == "be_stopped" or f"in {how}" in report


def test_a_rank_that_ends_or_is_killed_leaves_no_watcher(tmp_path: Path) -> None:
    code = (f"with Watchdog(Path({str(tmp_path)!r}), Launch(), 300.0) as watchdog:\n"
            "    child = fork_with_its_pipes() if {forks} else 0\n"
            "    print(watchdog._process.pid, child, flush=True); input()\n")
    ranks = [(way, python(code.replace("{forks}", str(way == "a child lives")))) for way in (
        "end", "kill", "a child lives")]
    for way, rank in ranks:
        assert rank.stdout is not None
        process, child = map(int, rank.stdout.readline().split())
        if way != "end":
            rank.kill()
        rank.communicate("\n", timeout=30)
        deadline = time.monotonic() + 5
        while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = Path(f"/proc/{process}").exists()
        if child:
            os.kill(child, signal.SIGKILL)
        assert not left, way
    assert list(tmp_path.iterdir()) == []
