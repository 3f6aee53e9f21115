"""Ranks that hang in all ways, and are watched."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from moescale.cluster.launch import Launch
from moescale.cluster.watchdog import Watchdog
from moescale.cluster.watcher import Limits

LIMITS = Limits(times=10, floor_seconds=1.0, timeout_seconds=1.5, grace_seconds=0.5)


def wait_with_the_lock() -> None:
    ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)


def wait_without_the_lock() -> None:
    ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)


def wait_for_ever() -> None:
    threading.Event().wait()


def be_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fork_with_its_pipes() -> int:
    """Fork a child that keeps what this process has open, its streams apart. -> its process id"""
    child = os.fork()
    if child == 0:
        os.closerange(0, 3)
        time.sleep(60)
        os._exit(0)
    return child


def hang(run_dir: str, how: str, pause: bool) -> None:
    with Watchdog(Path(run_dir), Launch(host="here"), 1.5, LIMITS) as watchdog:
        for step in range(1, 9):
            watchdog.step(step)
            time.sleep(0.02)
        if pause:
            watchdog.pause("evaluation")
        globals()[how]()


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", f"from tests.support.hangs import *\n{code}"], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
