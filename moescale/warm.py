"""Ranks that torchrun, or our agent, starts again without importing anything.

The first process of a rank leaves a spare behind: a process that imports all that training needs, and
then waits at a socket. A process that torchrun starts in the rank's place hands its arguments,
environment and streams to the spare, which forks the new rank within milliseconds; until that rank
ends, the process passes signals on to it, and then leaves with its status. The spare ends with torchrun.
Only Python's own library is imported here, since importing the rest is what takes the time.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LONGEST_REQUEST = 1 << 22  # bytes
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def run_in_spare() -> None:
    """Let the spare of this rank run it, and leave with its status; return where there is no spare."""
    path = _socket_path()
    connection = socket.socket(socket.AF_UNIX)
    if not path.exists():
        return
    try:
        connection.connect(str(path))
        request = json.dumps({"arguments": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ)})
        connection.sendall(len(request.encode()).to_bytes(8, "little"))
        socket.send_fds(connection, [b"s"], [0, 1, 2])
        connection.sendall(request.encode())
        rank = int.from_bytes(_receive(connection, 8), "little")
    except OSError:
        path.unlink(missing_ok=True)  # of a spare that was killed, so that there will be another
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(rank, number)

    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, pass_on)
    try:
        status = int.from_bytes(_receive(connection, 8), "little", signed=True)
    except OSError:
        status = 1  # the spare is gone, and the rank with it
    if status < 0:  # as the rank ended
        with suppress(OSError):  # SIGKILL knows no handlers
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def leave_spare(run: Callable[[], object]) -> None:
    """Fork the spare of this rank, unless there is one. run: the command, which the spare calls in each rank.

    It has to be called before anything starts threads.
    """
    path, launcher = _socket_path(), os.getppid()
    if path.exists() or os.fork() > 0:
        return
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        os.closerange(3, 4096)
        _serve(path, launcher, run)
    finally:
        os._exit(0)


def _serve(path: Path, launcher: int, run: Callable[[], object]) -> None:
    """Import everything, then run one rank after another until torchrun is gone."""
    torchrun = os.pidfd_open(launcher)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # the rank that trains comes first
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch._dynamo  # noqa: F401 - DTensor would, on first use

    import moescale.trainer  # noqa: F401
    from moescale.engine.base import import_native

    import_native()
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(str(path))
        server.listen()
        while True:
            ready = _wait(server, torchrun)
            if torchrun in ready:
                return
            connection, _ = server.accept()
            with connection, suppress(OSError):
                _run_rank(connection, [server.fileno(), torchrun], run)
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # others wait there
            path.parent.rmdir()


def _run_rank(connection: socket.socket, own: Sequence[int], run: Callable[[], object]) -> None:
    """Fork one rank, and say how it ended; it ends with whoever asked for it, and with torchrun.

    own: descriptors of this process alone, the last one torchrun's.
    """
    size = int.from_bytes(_receive(connection, 8), "little")
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(_receive(connection, min(size, LONGEST_REQUEST)))
    rank = os.fork()
    if rank == 0:
        for descriptor in (connection.fileno(), *own):
            os.close(descriptor)
        _become(request, streams, run)
    for stream in streams:
        os.close(stream)
    connection.sendall(rank.to_bytes(8, "little"))
    process = os.pidfd_open(rank)
    try:
        ready = _wait(process, connection, own[-1])
        if process not in ready:
            os.kill(rank, signal.SIGKILL)
        _, status = os.waitpid(rank, 0)
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))
    finally:
        os.close(process)


def _become(request: Mapping[str, Any], streams: list[int], run: Callable[[], object]) -> NoReturn:
    """Turn this forked process into the rank that was asked for."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[:] = [word for word in request["arguments"] if word != "--warm"]  # it has a spare
    status = 1
    try:
        run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os._exit(status)


def _socket_path() -> Path:
    """Name the socket of this rank's spare, in a folder of this user alone."""
    folder = Path(tempfile.gettempdir()) / f"moescale-spares-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise OSError(f"{folder} is not this user's alone")
    launcher = os.getppid()
    began = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    return folder / f"{launcher}-{began}-{os.environ.get('LOCAL_RANK', '0')}"


def _wait(*readable: Any) -> list[Any]:
    """Wait until some of these sockets or descriptors can be read, or end, and return those."""
    return select.select(readable, [], [])[0]


def _receive(connection: socket.socket, size: int) -> bytes:
    """Read so many bytes. Raises OSError where the other side is gone."""
    data = b""
    while len(data) < size:
        block = connection.recv(size - len(data))
        if not block:
            raise ConnectionError("the other side is gone")
        data += block
    return data
