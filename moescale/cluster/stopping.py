"""What asks a run to end before its last step, or to save between two: signals, a time limit, the clock.

A signal may reach one rank alone, and clocks differ. So ranks ask each other, about once a second and all after the
same step, and follow what rank 0's clock and any rank's signal say.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

from moescale.config import Stopped

STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: it did not fail, and goes on when it is started again
INTERRUPTED_STATUS = 130  # as of a command that Ctrl-C ends
TIME_LIMIT = "run.time_limit_minutes"
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
REASONS = ("", TIME_LIMIT, *SIGNALS)
ASK_SECONDS = 1.0
MOST_STEPS = 1000
RETRY_SECONDS, MOST_RETRY_SECONDS = 30.0, 600.0  # after one save, and after many, that could not be written
SECOND_PRESS_SECONDS = 1.0  # sooner, it is one Ctrl-C that a terminal and a launcher both passed on


class StopRequests:
    """Listens to signals, as a context. Until `hold` they end the run at once; then they wait for the loop to ask."""

    def __init__(self) -> None:
        self.asked = ""  # the first signal that came, by name
        self.at_once = False  # a second Ctrl-C came
        self._held = self._leaving = False
        self._interrupted = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # no other may handle signals
        for name in SIGNALS:
            number = signal.Signals[name]
            if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """Note signals from now on, so that the step under way can be finished and saved."""
        self._held = True

    @contextmanager
    def told_apart(self) -> Iterator[None]:
        """Raise KeyboardInterrupt for a second Ctrl-C, whatever it was taken for on its way."""
        try:
            yield
        except BaseException:
            self._leaving = True  # further signals change nothing but the second Ctrl-C
            if self.at_once:
                raise KeyboardInterrupt from None
            raise

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        interrupts = name == "SIGINT"
        again = interrupts and self._interrupted > 0 and now - self._interrupted > SECOND_PRESS_SECONDS
        if interrupts and not self._interrupted:
            self._interrupted = now
        self.asked = self.asked or name
        if again:
            self.at_once = True
            raise KeyboardInterrupt
        if not self._held and not self._leaving:
            self._leaving = True
            if interrupts:
                raise KeyboardInterrupt
            raise Stopped(f"stopped by {name} before the first step", STOPPED_STATUS)


@dataclass(frozen=True)
class Order:
    """What all ranks do after a step. stop: why the run ends here, or empty; then it saves too."""

    save: bool = False
    stop: str = ""

    @property
    def status(self) -> int:
        """The exit status of the process."""
        return INTERRUPTED_STATUS if self.stop == "SIGINT" else STOPPED_STATUS


class Orders:
    """Decides after each step whether to save or to stop, the same on every rank.

    started: when the process began, by time.monotonic. The limits are minutes, or None.
    """

    def __init__(self, requests: StopRequests, device: torch.device, *, save_minutes: float | None,
                 limit_minutes: float | None, started: float) -> None:
        self.requests, self.device = requests, device
        self.save_seconds = None if save_minutes is None else save_minutes * 60
        self.ends = None if limit_minutes is None else started + limit_minutes * 60
        self._saved = self._asked = time.monotonic()
        self._failures = 0
        self._retry: float | None = None  # when a save that failed is tried again
        self._asked_at: int | None = None  # steps
        self._next: int | None = None

    def after(self, step: int) -> Order:
        """Ask all ranks if it is time to. step: the number of steps done"""
        if dist.is_initialized() and self._next is not None and step < self._next:
            return Order()
        return self.ask(step)

    def ask(self, step: int) -> Order:
        """Ask all ranks now; all of them must. One small collective, and a wait for the device."""
        now = time.monotonic()
        reason = self.requests.asked or (TIME_LIMIT if self.ends is not None and now >= self.ends else "")
        save = self.save_seconds is not None and now - self._saved >= self.save_seconds
        save = save or (self._retry is not None and now >= self._retry)
        if not dist.is_initialized():
            return Order(save or bool(reason), reason)
        first = dist.get_rank() == 0
        told = torch.tensor([REASONS.index(reason), save and first, self._plan(step, now) if first else 0],
                            device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        code, due, self._next = told.tolist()
        self._asked, self._asked_at = time.monotonic(), step
        return Order(bool(due or code), REASONS[code])

    def saved(self) -> None:
        """Note that a checkpoint is written now."""
        self._saved, self._retry = time.monotonic(), None

    def note_failures(self, count: int) -> None:
        """Ask for another save some time after one that failed, which is longer after more. count: in a row so far"""
        if count != self._failures:
            wait = min(MOST_RETRY_SECONDS, RETRY_SECONDS * 2.0 ** (count - 1))
            self._failures, self._retry = count, None if count == 0 else time.monotonic() + wait

    def _plan(self, step: int, now: float) -> int:
        """Compute the step after which to ask again."""
        if self._asked_at is None or step <= self._asked_at:
            return step + 1
        pace = (now - self._asked) / (step - self._asked_at)
        return step + min(MOST_STEPS, max(1, int(ASK_SECONDS / max(pace, 1e-9))))


def die_with_launcher() -> None:
    """End with torchrun when it is killed: ranks that live on would write beside the run that takes over."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
