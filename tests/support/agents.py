"""The agent of one node, with two ranks that act as they are told."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from moescale.cluster import agent
from tests.support.ports import free_port

RANK = """
import os, signal, sys, time
rank, act = os.environ["LOCAL_RANK"], sys.argv[1]
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75 if act == "wait" else 1))
if act == "importing":  # no handlers yet
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
if act == "nohup":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(signal.getsignal(signal.SIGHUP) != signal.SIG_IGN))
with open("started", "a") as file:
    file.write(rank)
if rank == "1" and act.startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, act))
if act == "once":
    sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
if act.isdigit():
    sys.exit(int(act))
time.sleep(20)
"""


class Node:
    """An agent in a process of its own, forked, so that torch is imported already."""

    def __init__(self, folder: Path, act: str, restarts: int = 0, before: Callable[[], object] = lambda: None) -> None:
        self.folder = folder
        (folder / "rank.py").write_text(RANK)
        words = ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "job", "--local-addr", "127.0.0.1",
                 "--nproc-per-node", "2", "--max-restarts", str(restarts), "rank.py", act]
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(words, before))
        self.process.start()

    def _run(self, words: list[str], before: Callable[[], object]) -> None:
        gc.freeze()  # what earlier tests left would wait here for threads that a fork leaves behind
        os.chdir(self.folder)
        file = os.open("said", os.O_CREAT | os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - pytest's is not the process's
        sys.argv = ["agent", *words]
        before()
        agent.main()

    def wait_for_ranks(self, starts: int = 1) -> None:
        deadline = time.monotonic() + 20
        while not (self.folder / "started").exists() or len((self.folder / "started").read_text()) < 2 * starts:
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)
        time.sleep(0.1)  # handlers are set before a rank notes its start

    def end(self) -> int:
        self.process.join(30)
        assert not self.process.is_alive(), self.said
        return self.process.exitcode or 0

    @property
    def said(self) -> list[str]:
        return (self.folder / "said").read_text().splitlines()

    @property
    def starts(self) -> int:
        started = (self.folder / "started").read_text()  # one may be ended before it notes its start
        return max(started.count(rank) for rank in "01")
