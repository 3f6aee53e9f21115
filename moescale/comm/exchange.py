"""Exchanges of rows between ranks that overlap with computation: started, and finished later.

In backward the gradients take the reverse exchange: it starts where the forward one finished, and finishes where that
one started. Autograd runs backward in the reverse order of forward, so that what is computed between the two in one
direction is also computed between them in the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moescale.comm.collectives import Group, all_gather_single, reduce_scatter_single

Pausing = Generator[None, None, Tensor]
"""Work that pauses whenever an exchange of its own is under way, and returns a tensor."""
Result = TypeVar("Result")


class CommunicationError(RuntimeError):
    """Ranks did not meet in a collective; the message names the rank, the layer and the sizes."""


class Exchange(ABC):
    """A collective on rows: who sends what to whom. label: the layer, for errors."""

    def __init__(self, group: Group, label: str) -> None:
        self.group, self.label = group, label

    def launch(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Start sending. rows: [sent, ...]. -> the rows received, valid after `wait`; the work to wait for"""
        with self._named_errors():
            return self._launch(rows)

    def wait(self, work: Any) -> None:
        """Wait for it. Raises CommunicationError when a rank is gone or does not come within the group's time-out."""
        with self._named_errors():
            work.wait()

    @abstractmethod
    def reverse(self) -> Exchange:
        """Make the exchange that gradients and outputs take."""

    @abstractmethod
    def _launch(self, rows: Tensor) -> tuple[Tensor, Any]: ...

    @abstractmethod
    def _sizes(self) -> str: ...

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        with named_errors(self.label, self._sizes):
            yield


class AllToAll(Exchange):
    """The first send[0] rows go to rank 0 of the group, the next send[1] to rank 1, and so on; zero is allowed."""

    def __init__(self, send: Sequence[int], receive: Sequence[int], group: Group, label: str) -> None:
        super().__init__(group, label)
        self.send, self.receive = list(send), list(receive)

    def reverse(self) -> AllToAll:
        return AllToAll(self.receive, self.send, self.group, self.label)

    def _launch(self, rows: Tensor) -> tuple[Tensor, Any]:
        received = rows.new_empty(sum(self.receive), *rows.shape[1:])
        work = dist.all_to_all_single(
            received, rows.contiguous(), self.receive, self.send, group=self.group, async_op=True)
        return received, work

    def _sizes(self) -> str:
        return f"all-to-all, rows by rank: sends {self.send}, expects {self.receive}"


class AllGather(Exchange):
    """Every rank's rows go to all ranks; each rank has as many."""

    def reverse(self) -> ReduceScatter:
        return ReduceScatter(self.group, self.label)

    def _launch(self, rows: Tensor) -> tuple[Tensor, Any]:
        gathered = rows.new_empty(dist.get_world_size(self.group) * len(rows), *rows.shape[1:])
        return gathered, all_gather_single(gathered, rows.contiguous(), group=self.group, async_op=True)

    def _sizes(self) -> str:
        return f"all-gather of {dist.get_world_size(self.group)} ranks"


class ReduceScatter(Exchange):
    """The ranks' rows are added up, and each rank gets a part, in order."""

    def reverse(self) -> AllGather:
        return AllGather(self.group, self.label)

    def _launch(self, rows: Tensor) -> tuple[Tensor, Any]:
        part = rows.new_empty(len(rows) // dist.get_world_size(self.group), *rows.shape[1:])
        return part, reduce_scatter_single(part, rows.contiguous(), group=self.group, async_op=True)

    def _sizes(self) -> str:
        return f"reduce-scatter of {dist.get_world_size(self.group)} ranks"


class AsyncExchange:
    """One exchange of one tensor that is under way. Differentiable."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.work: Any = None
        self.received: Tensor | None = None
        self.sent: Tensor | None = None

    @classmethod
    def start(cls, rows: Tensor, exchange: Exchange) -> AsyncExchange:
        """Start sending rows, [sent, ...]."""
        started = cls(exchange)
        started.sent = _Start.apply(rows, started)
        return started

    def finish(self) -> Tensor:
        """Wait for what the other ranks sent. -> [received, ...]"""
        sent, self.sent = self.sent, None  # its graph holds this object: no reference cycle
        return _Finish.apply(sent, self)

    def launch(self, rows: Tensor, exchange: Exchange) -> Tensor:
        """Launch the exchange outside autograd. -> the rows received, valid after `wait`"""
        self.received, self.work = exchange.launch(rows)
        return self.received

    def wait(self) -> Tensor:
        """Wait for what was launched. -> the rows received"""
        received, work = self.received, self.work
        assert received is not None
        self.exchange.wait(work)
        self.received = self.work = None
        return received


class _Start(torch.autograd.Function):
    """Stands for the rows until the exchange is finished; in backward, waits for their gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, started: AsyncExchange) -> Tensor:
        ctx.started = started
        started.launch(rows, started.exchange)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.started.wait(), None


class _Finish(torch.autograd.Function):
    """Waits for the rows; in backward, launches the reverse exchange of their gradient."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, started: AsyncExchange) -> Tensor:
        ctx.started = started
        return started.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.started.launch(grad, ctx.started.exchange.reverse()), None


def exchange_numbers(numbers: Tensor, group: Group, label: str) -> Tensor:
    """Send one row to each rank of the group. numbers: [ranks, ...] int64. -> [ranks, ...], by sender"""
    received = torch.empty_like(numbers)
    with named_errors(label, lambda: f"{numbers.shape[1]} counts to each of {len(numbers)} ranks"):
        dist.all_to_all_single(received, numbers.contiguous(), group=group)
    return received


def take_turns(tasks: Sequence[Generator[None, None, Result]]) -> list[Result]:
    """Run each task until it pauses, then the next, in turn: while one's rows are under way, another computes.

    The order is the same on every rank, so that their exchanges meet. -> what each task returned
    """
    results: dict[int, Result] = {}
    while len(results) < len(tasks):
        for index, task in enumerate(tasks):
            if index not in results:
                try:
                    next(task)
                except StopIteration as end:
                    results[index] = end.value
    return [results[index] for index in range(len(tasks))]


@contextmanager
def named_errors(label: str, sizes: Any) -> Iterator[None]:
    """Turn errors of collectives into a CommunicationError that names rank, layer and sizes. sizes: () -> str"""
    try:
        yield
    except RuntimeError as error:
        rank, cause = dist.get_rank(), " ".join(str(error).split())
        raise CommunicationError(f"rank {rank}, {label}: {sizes()}; the ranks did not meet: {cause}") from error
