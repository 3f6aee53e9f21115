"""Check, weigh and time layers in alternation, on one rank or several."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from moe_cases import Case, make_tokens, make_weights, reference
from moe_peers import Peer, make_peer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from traffic import Counter

from moescale.ops.device import prepare_processor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the norm of the difference over the norm


@dataclass(frozen=True)
class Entry:
    """Who runs, and over which routing."""

    peer: str
    routing: str


@dataclass
class Figures:
    """Of one entry on one rank. error: the worst relative one and where, None where there is no reference.

    peak_bytes: most that was alive at once beside x, weights and the output's gradient. saved_bytes: of it, what was
    kept from forward for backward. result_bytes: the output and the gradients of x and of the weights.
    sent_bytes: to other ranks. seconds: of each round.
    """

    error: tuple[float, str] | None = None
    peak_bytes: int = 0
    saved_bytes: int = 0
    result_bytes: int = 0
    sent_bytes: int = 0
    seconds: list[float] = field(default_factory=list)


class Runner:
    """One entry at work on this rank."""

    def __init__(self, entry: Entry, case: Case, dtype: torch.dtype, group: Any) -> None:
        self.case, self.dtype, self.group = case, dtype, group
        self.weights = make_weights(case, dtype)
        self.all_tokens = make_tokens(case, entry.routing, self.weights["router"], dtype)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.x, self.grad = (tensor.chunk(ranks)[rank].clone() for tensor in self.all_tokens)
        self.x.requires_grad_()
        self.peer: Peer = make_peer(entry.peer, case, self.weights, group)

    def run(self) -> Tensor:
        y = self.peer.forward(self.x)
        y.backward(self.grad)
        return y.detach()

    def clear(self) -> None:
        self.x.grad = None
        self.peer.module.zero_grad(set_to_none=True)

    def timed(self, clock: Callable[[], float]) -> float:
        self.clear()
        dist.barrier(self.group)
        begin = clock()
        self.run()
        return clock() - begin

    def worst_error(self) -> tuple[float, str] | None:
        """Hold output and gradients to the reference, each rank its own tokens and experts."""
        self.clear()
        y = self.run()
        if not self.peer.exact:
            return None
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        exact = reference(self.weights, *self.all_tokens, self.case.top_k)
        ours = {"output": y, "x": self.x.grad, **self.peer.weights()}
        dist.all_reduce(ours["router"], group=self.group)
        errors = []
        for name, value in ours.items():
            assert value is not None
            part = exact[name] if name == "router" else exact[name].chunk(ranks)[rank]
            errors.append((float((value.double() - part).norm() / part.norm().clamp(min=1e-30)), name))
        return max(errors)

    def weigh(self, figures: Figures) -> None:
        """Count bytes: what the allocator hands out and takes back, what autograd keeps, what goes to other ranks."""
        self.clear()
        mine = {tensor.untyped_storage().data_ptr() for tensor in (self.x, *self.peer.module.parameters())}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in mine:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = self.peer.forward(self.x)
        figures.saved_bytes = sum(saved.values())
        figures.result_bytes = sum(tensor.nbytes for tensor in (y, self.x, *self.peer.module.parameters()))
        del y
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.run()
        figures.peak_bytes = peak_bytes(profiler)
        self.clear()
        with Counter() as counter:
            self.run()
        figures.sent_bytes = sum(counter.sent.values())


def peak_bytes(profiler: profile) -> int:
    """Find the most bytes alive at once of those that were allocated under the profiler."""
    kineto: Any = profiler.profiler.kineto_results if profiler.profiler is not None else None
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def on_ranks(ranks: int, *args: Any) -> list[list[Figures]]:
    """Call `measure` on new processes: what is forked while torch has threads may hang. -> what each rank returned"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with ProcessPoolExecutor(ranks, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(measure, rank, ranks, address, *args) for rank in range(ranks)]
        return [future.result() for future in futures]


def measure(
    rank: int, ranks: int, address: str, case: Case, dtype: torch.dtype, entries: list[Entry], rounds: int,
    threads: int, cpu_time: bool,
) -> list[Figures]:
    """On each rank: check all, weigh all, then time in alternation those that gave the right results.

    What takes longer than ten times the first entry is timed in three rounds only.
    """
    torch.set_num_threads(threads)
    prepare_processor()  # for all alike
    clock = time.process_time if cpu_time else time.perf_counter
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    group = dist.group.WORLD
    runners = [Runner(entry, case, dtype, group) for entry in entries]
    results = [Figures(error=runner.worst_error()) for runner in runners]
    for runner, figures in zip(runners, results, strict=True):
        wrong = torch.tensor(figures.error is not None and not figures.error[0] <= TOLERANCE[dtype], dtype=torch.int32)
        dist.all_reduce(wrong, group=group)
        if not wrong:
            runner.weigh(figures)
            figures.seconds.append(runner.timed(clock))
    warm_up = [figures.seconds.copy() for figures in results]
    first = torch.tensor([seconds[0] if seconds else 0.0 for seconds in warm_up])
    dist.broadcast(first, 0, group=group)  # all ranks must agree on who takes part
    for figures in results:
        figures.seconds.clear()
    for number in range(rounds):
        for runner, figures, begin in zip(runners, results, first.tolist(), strict=True):
            if begin and (number < 3 or begin < 10 * first[0]):
                figures.seconds.append(runner.timed(clock))
    dist.destroy_process_group()
    return results
