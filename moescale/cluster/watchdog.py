"""A rank's side of the watchdog: it starts a process of its own beside itself, and tells it how far it is."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Self

from moescale.cluster import watcher
from moescale.cluster.launch import Launch
from moescale.cluster.watcher import Limits

TIMES, FLOOR_SECONDS = 10.0, 10.0  # of a step that hangs: over the usual time, and at least
GRACE_SECONDS = 5.0
ALIVE_SECONDS = 0.5
END_SECONDS = 2.0


class Watchdog:
    """Has this rank watched, as a context: where it hangs its stacks go to `RUN/stacks`, and in the end it is killed.

    limits: None are those of a run with this time-out.
    """

    def __init__(self, run_dir: Path, launch: Launch, timeout_seconds: float, limits: Limits | None = None) -> None:
        self.folder, self.launch = run_dir / "stacks", launch
        self.limits = limits or Limits(TIMES, FLOOR_SECONDS, timeout_seconds, GRACE_SECONDS)
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        heard, self._beats = os.pipe()
        stacks, self._stacks = os.pipe()
        os.set_blocking(self._beats, False)
        arguments = json.dumps({"rank": self.launch.rank, "host": self.launch.host, "folder": str(self.folder),
                                "stacks": stacks, "limits": asdict(self.limits)})
        self._process = subprocess.Popen([sys.executable, "-I", "-S", watcher.__file__, arguments], stdin=heard,
                                         stdout=subprocess.DEVNULL, pass_fds=[stacks])
        os.close(heard)
        os.close(stacks)
        faulthandler.register(signal.SIGUSR2, file=self._stacks)
        threading.Thread(target=self._live, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        os.close(self._beats)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._process.kill()
        self._process.wait()
        faulthandler.unregister(signal.SIGUSR2)
        os.close(self._stacks)

    def step(self, step: int) -> None:
        """Say that this step begins. step: counted from 1"""
        self._say(f"step {step}")

    def pause(self, what: str) -> None:
        """Say that something else begins, which may take long: a rank that waits for others in it ends by itself."""
        self._say(f"pause {what}")

    def _live(self) -> None:
        while not self._ended.wait(ALIVE_SECONDS):
            self._say("alive")

    def _say(self, line: str) -> None:
        with suppress(OSError):  # the watcher is gone, or behind
            os.write(self._beats, f"{line}\n".encode())
