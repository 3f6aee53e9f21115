"""Run a function on several gloo ranks of this machine, one core each, with a hard time-out."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch


class RanksError(RuntimeError):
    """A rank raised, died or did not end in time; the message holds its traceback."""


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120) -> list[Any]:
    """Call function(*args) on each rank, with the environment that torchrun would set. -> what each returned

    Ranks are forked: they see what this process has in memory, args may hold anything, and results are pickled.
    Raises RanksError with the first rank's traceback, or when a rank is still busy at the time-out.
    """
    importlib.import_module("torch._dynamo")  # DTensor would, on first use, for two seconds on each rank of each call
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
    ranks = [
        context.Process(target=_rank, args=(rank, num_ranks, port, send, function, args), daemon=True)
        for rank, (_, send) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    for _, send in pipes:
        send.close()
    try:
        return _collect([receive for receive, _ in pipes], timeout_seconds)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _collect(pipes: list[Connection], timeout_seconds: float) -> list[Any]:
    deadline = time.monotonic() + timeout_seconds
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for index, pipe in enumerate(pipes) if index not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            busy = ", ".join(str(pipes.index(pipe)) for pipe in waiting)
            raise RanksError(f"ranks {busy} did not end in {timeout_seconds:.0f} s")
        for rank in [rank for rank, pipe in enumerate(pipes) if pipe in ready]:
            try:
                good, value = pickle.loads(pipes[rank].recv_bytes())  # recv shares tensors, with a rank that is gone
            except EOFError:
                raise RanksError(f"rank {rank} died") from None
            if not good:
                raise RanksError(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(rank: int, num_ranks: int, port: int, send: Connection, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="",
    )
    try:
        result = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    send.send_bytes(pickle.dumps(result))
