"""The process beside a rank that sees it hang: it asks for its stacks, and ends it at the time-out.

It runs this file alone, without torch or anything of ours, so that it takes milliseconds and few megabytes, and lives
on where its rank is stopped, waits in native code or holds Python's lock. What it hears comes through a pipe from
`watchdog.py`, a line each: `alive`, `step N` where a step begins, and `pause WHAT` where something begins that may take
long, such as an evaluation. The rank's stacks come through another pipe, when it gets SIGUSR2.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import statistics
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REMEMBERED = 100  # steps whose median is the usual time
FIRST_STEPS = 3  # of a start, which compile and allocate; and as many make a median
LOOK_SECONDS = 0.5
STACK_SECONDS = 1.0  # until a rank has written its stacks
GATHER_SECONDS = 2.0  # until the stacks of all ranks lie in the run directory
SLEPT_SECONDS = 5.0  # where a look comes so late, the machine or the whole job stood still, not the rank
FRAME = re.compile(r'  File "(?:.*/)?moescale/(.+)", line (\d+) in (.+)')
STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a device or a disk",
          "Z": "dead", "R": "computing", "S": "waiting"}


@dataclass(frozen=True)
class Limits:
    """What counts as a hang. times, floor_seconds: a step that takes so many times the usual, and at least as long.

    timeout_seconds: after the usual time of a step, when the rank is killed. grace_seconds: that ranks get before, to
    say by themselves that another one did not come.
    """

    times: float
    floor_seconds: float
    timeout_seconds: float
    grace_seconds: float


class Pace:
    """How long steps take, and the one under way has taken. now: by time.monotonic"""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.step: int | None = None  # under way; None in a pause
        self.what = "the start"  # what is under way in a pause
        self._began = self._heard = now
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._first = FIRST_STEPS  # steps that do not count yet

    @property
    def usual(self) -> float | None:
        """The median of the last steps, in seconds; None until there are enough of them."""
        return statistics.median(self._seconds) if len(self._seconds) >= FIRST_STEPS else None

    def hear(self, line: str, now: float) -> None:
        """Take what the rank says."""
        self._heard = now
        word, _, rest = line.partition(" ")
        if word == "alive":
            return
        if self.step is not None and self._first > 0:
            self._first -= 1
        elif self.step is not None:
            self._seconds.append(now - self._began)
        self.step = int(rest) if word == "step" else None
        self.what, self._began = rest if word == "pause" else f"step {rest}", now

    def shift(self, seconds: float) -> None:
        """Leave out a time in which nobody could run."""
        self._began += seconds
        self._heard += seconds

    def taken(self, now: float) -> float:
        """Return how many seconds that what is under way has taken."""
        return now - self._began

    def hangs(self, now: float) -> bool:
        """Whether the step takes so long that the stacks are of use, or the rank has been silent for long."""
        limits = self.limits
        if now - self._heard > max(limits.floor_seconds, limits.timeout_seconds / 2):
            return True
        return self.step is not None and self.usual is not None and (
            self.taken(now) > max(limits.times * self.usual, limits.floor_seconds))

    def is_over(self, now: float) -> bool:
        """Whether the rank must end: its step takes longer than the time-out, or it has been silent for so long."""
        longest = self.limits.timeout_seconds + self.limits.grace_seconds
        if now - self._heard > longest:
            return True
        return self.step is not None and self.usual is not None and self.taken(now) > longest + self.usual


class Watcher:
    """Watches the process that started this one. stacks: a descriptor from which its stacks are read."""

    def __init__(self, rank: int, host: str, folder: Path, stacks: int, limits: Limits) -> None:
        self.rank, self.host, self.folder, self.stacks = rank, host, folder, stacks
        self.pid = os.getppid()
        self.pace = Pace(limits, time.monotonic())
        self._told = ""  # the step or pause whose stacks were written

    def watch(self) -> None:
        """Listen until the rank has ended, or must."""
        heard, looked = b"", time.monotonic()
        while self._lives:
            if select.select([0], [], [], LOOK_SECONDS)[0]:
                received = os.read(0, 1 << 16)
                if not received:
                    return
                *lines, heard = (heard + received).split(b"\n")
                for line in lines:
                    self.pace.hear(line.decode(), time.monotonic())
            now = time.monotonic()
            if now - looked > SLEPT_SECONDS:
                self.pace.shift(now - looked)
            looked = now
            if self.pace.is_over(now):
                return self._end(now)
            if self.pace.hangs(now) and self._told != self.pace.what:
                self._told = self.pace.what
                self._tell(now)
                looked = time.monotonic()

    def _tell(self, now: float) -> None:
        """Write this rank's stacks, and as rank 0 say where all ranks stand."""
        if self._write_stacks(now) and self.rank == 0:
            time.sleep(GATHER_SECONDS)
            usual = "" if self.pace.usual is None else f", and usual are {self.pace.usual:.3g} s"
            said = "; ".join(f"{', '.join(ranks)}: {where}" for where, ranks in self._gather().items())
            _say(f"{self.pace.what} has taken {self.pace.taken(now):.3g} s{usual}; {said}; all stacks are in "
                 f"{self._place()}")

    def _end(self, now: float) -> None:
        """Kill the rank, which then leaves as killed by SIGKILL, and say so."""
        if not self._write_stacks(now):
            return
        _say(f"rank {self.rank} on {self.host}: {self.pace.what} did not end within run.timeout_seconds="
             f"{self.pace.limits.timeout_seconds:g} ({self._state()}), and the rank is killed; its stacks are in "
             f"{self._place()}; if it only needs longer, raise run.timeout_seconds")
        self._signal(signal.SIGKILL)

    @property
    def _lives(self) -> bool:
        """Whether the rank lives; when it has ended, its process id may be that of another process."""
        return os.getppid() == self.pid

    def _signal(self, number: signal.Signals) -> bool:
        """Send the rank a signal; return whether it lives."""
        if not self._lives:
            return False
        os.kill(self.pid, number)
        return True

    def _place(self) -> Path:
        return self.folder / self.pace.what.replace(" ", "_")

    def _write_stacks(self, now: float) -> bool:
        """Put the rank's stacks into the run directory, or on the terminal where that takes nothing.

        Returns whether the rank lives; of one that has ended nothing is written.
        """
        if not self._signal(signal.SIGUSR2):
            return False
        deadline, stacks = time.monotonic() + STACK_SECONDS, b""
        while (left := deadline - time.monotonic()) > 0 and select.select([self.stacks], [], [], left)[0]:
            stacks += os.read(self.stacks, 1 << 16)
        text = stacks.decode(errors="replace")
        report = (f"rank {self.rank} on {self.host}\n{where(text) or self._state()}\n"
                  f"process {self.pid}, {self._state()}; {self.pace.what} has taken {self.pace.taken(now):.3f} s\n"
                  f"{text}")
        try:
            self._place().mkdir(parents=True, exist_ok=True)
            (self._place() / f"rank_{self.rank}.txt").write_text(report)
        except OSError:
            _say(report)
        return True

    def _gather(self) -> dict[str, list[str]]:
        """Read where the ranks stand. -> the ranks by place in the code, those that share one together"""
        found: dict[str, list[str]] = {}
        with suppress(OSError):
            for file in sorted(self._place().glob("rank_*.txt"), key=lambda file: int(file.stem[5:])):
                who, place, *_ = file.read_text().split("\n")
                found.setdefault(place, []).append(who)
        return found

    def _state(self) -> str:
        """Say in what state the system has the rank."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][:1]
        except OSError:  # not Linux
            return "state unknown"
        return STATES.get(state, state)


def where(stacks: str) -> str:
    """Find the innermost line of this project that the main thread is at, which is the last one in the list."""
    *_, main = stacks.split("(most recent call first):\n")
    for line in main.splitlines():
        if (found := FRAME.match(line)) is not None:
            return f"{found[1]}:{found[2]} in {found[3]}"
    return ""


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"moescale: {text}\n".encode())


def main() -> None:
    """Watch as the arguments say, one JSON object."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they are for the rank, with which this process ends
    given = json.loads(sys.argv[1])
    limits = Limits(**given.pop("limits"))
    Watcher(folder=Path(given.pop("folder")), limits=limits, **given).watch()


if __name__ == "__main__":
    main()
