"""Rows that travel between ranks while something else is computed: they set out, and later they arrive.

In backward the gradients take the way back, and are as long under way: they set out where the rows arrived. Autograd
runs backward in the reverse order of forward, so that what is computed between the two in one direction is also
computed between them in the other.
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

Walk = Generator[None, None, Tensor]
"""Work that pauses whenever rows of its own are under way, and ends with a tensor."""
Result = TypeVar("Result")


class CommunicationError(RuntimeError):
    """Ranks that do not meet; the message names the rank, the place and the sizes."""


class Exchange(ABC):
    """What travels from which rank to which. label: where in the model, for errors."""

    def __init__(self, group: Group, label: str) -> None:
        self.group, self.label = group, label

    def launch(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Let rows set out. -> where they will be when `wait` has returned; what to wait for, which keeps them"""
        with self._named_errors():
            return self._launch(rows)

    def wait(self, work: Any) -> None:
        """Raises CommunicationError when a rank is gone, or does not come within the group's time-out."""
        with self._named_errors():
            work.wait()

    @abstractmethod
    def reverse(self) -> Exchange:
        """The way that gradients take, and answers."""

    @abstractmethod
    def _launch(self, rows: Tensor) -> tuple[Tensor, Any]: ...

    @abstractmethod
    def _sizes(self) -> str: ...

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        with named_errors(self.label, self._sizes):
            yield


class AllToAll(Exchange):
    """The first send[0] rows go to rank 0 of the group, the next send[1] to rank 1, ...; zero allowed."""

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
    """Every rank's rows go to all ranks; as many on each."""

    def reverse(self) -> ReduceScatter:
        return ReduceScatter(self.group, self.label)

    def _launch(self, rows: Tensor) -> tuple[Tensor, Any]:
        gathered = rows.new_empty(dist.get_world_size(self.group) * len(rows), *rows.shape[1:])
        return gathered, all_gather_single(gathered, rows.contiguous(), group=self.group, async_op=True)

    def _sizes(self) -> str:
        return f"all-gather of {dist.get_world_size(self.group)} ranks"


class ReduceScatter(Exchange):
    """The ranks' rows are added up, and shared out in order."""

    def reverse(self) -> AllGather:
        return AllGather(self.group, self.label)

    def _launch(self, rows: Tensor) -> tuple[Tensor, Any]:
        share = rows.new_empty(len(rows) // dist.get_world_size(self.group), *rows.shape[1:])
        return share, reduce_scatter_single(share, rows.contiguous(), group=self.group, async_op=True)

    def _sizes(self) -> str:
        return f"reduce-scatter of {dist.get_world_size(self.group)} ranks"


class Journey:
    """One exchange of one tensor: `Journey(rows, exchange)` sets out, `arrive` ends it. Differentiable."""

    def __init__(self, rows: Tensor, exchange: Exchange) -> None:
        self.exchange = exchange
        self.work: Any = None
        self.received: Tensor | None = None
        self.sent: Tensor | None = _SetOut.apply(rows, self)

    def arrive(self) -> Tensor:
        """-> what the other ranks sent"""
        sent, self.sent = self.sent, None  # its graph holds this object: no ring
        return _Arrive.apply(sent, self)

    def set_out(self, rows: Tensor, exchange: Exchange) -> Tensor:
        self.received, self.work = exchange.launch(rows)
        return self.received

    def end(self) -> Tensor:
        received, work = self.received, self.work
        assert received is not None
        self.exchange.wait(work)
        self.received = self.work = None
        return received


class _SetOut(torch.autograd.Function):
    """Stands for the rows until they arrive. In backward its gradient is filled when the journey ends."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.set_out(rows, journey.exchange)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.end(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.end()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.set_out(grad, ctx.journey.exchange.reverse()), None


def exchange_numbers(numbers: Tensor, group: Group, label: str) -> Tensor:
    """Send one row to each rank of the group. numbers: [ranks, ...] int64. -> [ranks, ...], by source"""
    received = torch.empty_like(numbers)
    with named_errors(label, lambda: f"{numbers.shape[1]} counts to each of {len(numbers)} ranks"):
        dist.all_to_all_single(received, numbers.contiguous(), group=group)
    return received


def take_turns(walks: Sequence[Generator[None, None, Result]]) -> list[Result]:
    """Run each until it pauses, then the next, around and around: while rows of one travel, another computes.

    The order is the same on every rank, so that their exchanges meet. -> what each ended with
    """
    results: dict[int, Result] = {}
    while len(results) < len(walks):
        for index, walk in enumerate(walks):
            if index not in results:
                try:
                    next(walk)
                except StopIteration as end:
                    results[index] = end.value
    return [results[index] for index in range(len(walks))]


@contextmanager
def named_errors(label: str, sizes: Any) -> Iterator[None]:
    """Say who could not meet whom, where, and with what. sizes: () -> str"""
    try:
        yield
    except RuntimeError as error:
        rank, cause = dist.get_rank(), " ".join(str(error).split())
        raise CommunicationError(f"rank {rank}, {label}: {sizes()}; the ranks did not meet: {cause}") from error
