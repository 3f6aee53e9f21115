"""The agent of a node: torch's elastic agent, which starts and watches the ranks, with the manners that jobs need.

    python -m moescale.cluster.agent OPTIONS OF TORCHRUN -m moescale train CONFIG [KEY=VALUE]...

Beside what torchrun does, it passes signals on to its ranks and lets them finish, starts none again that left as it was
asked to or because of a mistake, leaves with the status of its ranks, says in one line what a rank that was killed
cannot say, and listens at one address alone (`rendezvous.py`).
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed import DistError
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.run import config_from_args, parse_args

from moescale.cluster.agreement import accuse
from moescale.cluster.launch import leave_signals_to_agent, read_secret
from moescale.cluster.rendezvous import BoundRendezvous, create_rendezvous
from moescale.cluster.stopping import INTERRUPTED_STATUS, STOPPED_STATUS
from moescale.config import Stopped

FINAL = (2, STOPPED_STATUS, INTERRUPTED_STATUS)  # after which ranks would do the same again, or were asked to leave
CHANGE_SECONDS = 3.0  # until a node that was asked to leave, or waits to come in, is known to all
SET_BY_TORCH = ("rank", "timeout")  # keys of other kinds of rendezvous
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Death:
    """How a process ended that could say nothing. signal: its number. out_of_memory: whether the kernel says so."""

    signal: int
    out_of_memory: bool

    def __str__(self) -> str:
        name = signal.Signals(self.signal).name
        if self.out_of_memory:
            return f"was killed by the kernel, because memory ran out ({name})"
        if self.signal in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE):
            return f"crashed in native code ({name})"
        return f"was killed by {name}"


class Agent(LocalElasticAgent):
    """Starts and watches the ranks of one node."""

    def __init__(self, spec: WorkerSpec, *, elastic: bool, **options: Any) -> None:
        """elastic: whether the number of nodes may change. Of the spec, the handler is a BoundRendezvous."""
        super().__init__(spec, **options)
        assert isinstance(spec.rdzv_handler, BoundRendezvous)
        self.meeting = spec.rdzv_handler
        self.elastic = elastic
        self.status = 0  # with which this process is to leave
        self.host = socket.gethostname()
        self._asked: signal.Signals | None = None
        self._starting = False  # whether ranks are being started, which then get what came meanwhile
        self._dead: set[int] = set()  # processes of which was spoken
        self._kills_before = _count_kills()

    @property
    def leaves_alone(self) -> bool:
        """Whether this node was asked to leave and the others go on; Ctrl-C ends them all."""
        return self.elastic and self._asked not in (None, signal.SIGINT)

    def listen_to_signals(self) -> None:
        """Take signals from now on: pass them on to the ranks, or leave where there are none yet."""
        _take_signals(self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or signal.Signals(number)
        if not self._starting and not self._pass_on(number):
            _leave_without_ranks(self._asked)

    def _pass_on(self, number: int) -> bool:
        """Send a signal to the ranks that are running. Returns whether there are any."""
        ranks = self._living()
        for process in ranks:
            with suppress(ProcessLookupError):
                os.kill(process, number)
        return bool(ranks)

    def _living(self) -> list[int]:
        context = self._pcontext
        return [] if context is None else [process for process in context.pids().values() if _is_running(process)]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self._asked is not None:
            _leave_without_ranks(self._asked)
        self.status = 0  # of these ranks, and not of those before them
        self._starting = True
        started = super()._start_workers(worker_group)
        self._starting = False
        if self._asked is not None:
            self._pass_on(self._asked)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Look how the ranks are. Who died without a word is spoken for before torch ends the others."""
        if self.leaves_alone:
            with suppress(RendezvousError, DistError):
                self.meeting.retire()
        ranks = {worker.id: worker.global_rank for worker in worker_group.workers}
        for process, rank in ranks.items():
            number = _killed_by(process)
            if number is not None:
                self._speak_for(worker_group, rank, process, number)
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            statuses = {rank: failure.exitcode for rank, failure in result.failures.items()}
            processes = {rank: process for process, rank in ranks.items()}
            for rank, status in statuses.items():
                if status < 0 and status != -signal.SIGTERM:
                    self._speak_for(worker_group, rank, processes[rank], -status)
            self.status = _status_of(list(statuses.values()))
            if self._asked is not None and self.status not in FINAL:  # as for a failure: the same command goes on
                self.status = _status_when(self._asked)
                if {-status for status in statuses.values()} <= {self._asked, signal.SIGTERM}:
                    _say(f"{self.host}: stopped by {self._asked.name} while ranks were starting")
            if self._asked is None and self._others_came_or_went():
                self._remaining_restarts += 1  # torch takes one
                if worker_group.group_rank == 0:
                    _say(f"{self.host}: nodes came or went, and all ranks are started again")
            elif self._asked is not None or self.status in FINAL:
                self._remaining_restarts = 0
            elif worker_group.group_rank == 0:
                self._announce()
        return result

    def _others_came_or_went(self) -> bool:
        """Whether ranks were asked to leave because more or fewer nodes are to go on, and not to end the run."""
        with suppress(RendezvousError, DistError):  # with the store that they meet in, all of them end
            return self.elastic and self.status == STOPPED_STATUS and self.meeting.wait_for_change(CHANGE_SECONDS)
        return False

    def _announce(self) -> None:
        """Say, as the first node, how it goes on after a failure."""
        left, most = self._remaining_restarts, self._worker_group.spec.max_restarts
        if left > 0:
            _say(f"{self.host}: all ranks are started again, {most - left + 1} of at most {most} times")
        elif most > 0:
            _say(f"{self.host}: the ranks were started again {most} times, which is all that was asked for: the job "
                 "ends; the same command goes on from the last checkpoint")

    def _speak_for(self, group: WorkerGroup, rank: int, process: int, number: int) -> None:
        if process in self._dead or number == self._asked:  # which ends a rank that has not taken signals yet
            return
        self._dead.add(process)
        kills = _count_kills()
        death = Death(number, number == signal.SIGKILL and kills is not None and kills != self._kills_before)
        self._kills_before = kills
        first = accuse(str(group.master_addr), int(group.master_port or 0), group.spec.rdzv_handler.get_run_id(), rank)
        if first:
            _say(f"rank {rank} on {self.host} {death}")


def _status_of(statuses: list[int]) -> int:
    """Choose the status to leave with: one after which nobody starts again, or else what a rank left with."""
    for status in (*FINAL, *statuses):
        if status in statuses and status > 0:
            return status
    return 1


def _status_when(asked: signal.Signals) -> int:
    return INTERRUPTED_STATUS if asked == signal.SIGINT else STOPPED_STATUS


def _take_signals(receive: Callable[[int, FrameType | None], None]) -> None:
    for number in SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup, which ranks inherit
        signal.signal(number, receive)


def _leave_without_ranks(number: int, frame: FrameType | None = None) -> NoReturn:
    asked = signal.Signals(number)
    raise Stopped(f"{socket.gethostname()}: stopped by {asked.name} before ranks were started", _status_when(asked))


def _is_running(process: int) -> bool:
    try:
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _killed_by(process: int) -> int | None:
    """Say which signal has ended a child that nobody has waited for yet; None where none has."""
    try:
        ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return ended.si_status if ended is not None and ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED) else None


def _count_kills() -> int | None:
    """Read how many processes the kernel has killed because memory ran out, here or in a control group."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return None


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # a terminal that is gone
        print(f"moescale: {text}", file=sys.stderr, flush=True)


def _advise(endpoint: str, nodes: str, ranks: str) -> str:
    """Say what to write where these options cannot be taken; empty where they can."""
    if not re.fullmatch(r".+:\d+", endpoint):
        return "write --rdzv-endpoint HOST:PORT, of any one of the nodes, or --standalone for one node"
    least, _, most = nodes.partition(":")
    if not re.fullmatch(r"\d+(:\d+)?", nodes) or not 0 < int(least) <= int(most or least):
        return f"NODES={nodes} (--nnodes) is no number of nodes: write one from 1, or MIN:MAX"
    if not re.fullmatch(r"0*[1-9]\d*|auto|cpu|gpu|xpu", ranks):
        return f"RANKS={ranks} (--nproc-per-node) is no number of ranks: write how many this node has"
    return ""


def run(arguments: list[str]) -> int:
    """Start ranks as these options of torchrun say, and watch them. Returns the exit status of the node."""
    usage = io.StringIO()
    try:
        with redirect_stderr(usage):
            options = parse_args(arguments)
    except SystemExit as ended:
        if ended.code == 0:  # --help
            return 0
        _say(f"an option of torchrun cannot be taken: {usage.getvalue().strip().partition('error: ')[2]}")
        return 2
    endpoint = "localhost:0" if options.standalone else options.rdzv_endpoint
    advice = _advise(endpoint, options.nnodes, options.nproc_per_node)
    if advice:
        _say(advice)
        return 2
    try:
        config, command, words = config_from_args(options)
    except (AssertionError, RuntimeError, ValueError) as error:
        _say(f"an option of torchrun cannot be taken: {' '.join(str(error).split())}")
        return 2
    assert isinstance(command, str)
    parameters = RendezvousParameters(
        "c10d", endpoint, config.run_id, config.min_nodes, config.max_nodes, config.local_addr,
        **{key: value for key, value in config.rdzv_configs.items() if key not in SET_BY_TORCH})
    spec = WorkerSpec(
        role=config.role, local_world_size=config.nproc_per_node, entrypoint=command, args=tuple(words),
        rdzv_handler=create_rendezvous(parameters, read_secret()), max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval, local_addr=config.local_addr)
    agent = Agent(spec, elastic=config.min_nodes < config.max_nodes, logs_specs=config.logs_specs,
                  start_method=config.start_method)
    agent.listen_to_signals()
    agent.run()
    if not agent.leaves_alone:
        with suppress(RendezvousError, DistError):  # the store is gone with the node that kept it
            spec.rdzv_handler.shutdown()
    return agent.status


def main() -> None:
    """Run the agent of this node."""
    logging.disable(logging.ERROR)  # torch's words about what is said here in one line
    try:
        _take_signals(_leave_without_ranks)
        leave_signals_to_agent()
        status = run(sys.argv[1:])
    except (RendezvousError, DistError) as error:
        _say(f"{socket.gethostname()}: the nodes did not meet: {' '.join(str(error).split()) or type(error).__name__}")
        status = 1
    except Exception:  # a fault of ours or of torch
        traceback.print_exc()
        status = 1
    except Stopped as error:
        _say(str(error))
        status = error.status
    sys.stderr.flush()
    os._exit(status)  # torch's threads would be waited for


if __name__ == "__main__":
    main()
