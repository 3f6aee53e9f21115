"""What a module may know of how the model is spread over ranks: a frozen message, which its `attach` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moescale.comm.collectives import Group
from moescale.comm.sequence_shards import SequenceShards


@dataclass(frozen=True)
class Share:
    """One of `size` equal shares of a dim. rank: which of them lies here. group: the ranks; None = one process."""

    rank: int = 0
    size: int = 1
    group: Group = None

    def first(self, length: int) -> int:
        """Return the index at which this rank's share of a dim of this length begins."""
        return length // self.size * self.rank

    def part(self, whole: Tensor, dim: int = 0) -> Tensor:
        """Take this rank's share of a tensor."""
        return whole if self.size == 1 else whole.chunk(self.size, dim)[self.rank]


@dataclass(frozen=True)
class HopPlan:
    """One hop of tokens to the ranks of their experts. where: among whom, for errors; others as in `Hop`."""

    group: Group
    etp: int = 1
    to_all: bool = False
    where: str = ""


@dataclass(frozen=True)
class RowCeiling:
    """How many rows the experts of a rank take at a time; fields as in `RowBudget`."""

    share: float
    drop: bool
    replica_groups: tuple[Group, ...] = ()


@dataclass(frozen=True)
class ExpertPlacement:
    """Where a layer's experts lie, and how tokens travel there.

    ep: this rank's share of the experts. etp: its share of each one's hidden features. group: the ranks among which
    tokens travel. hops: their way. chunks: in how many parts they travel. away: for each rank of ep, whether its
    experts are on another rank and on another node. ceiling: None = rows are not limited.
    """

    ep: Share = Share()
    etp: Share = Share()
    group: Group = None
    hops: tuple[HopPlan, ...] = ()
    chunks: int = 1
    away: tuple[tuple[bool, bool], ...] | None = None
    ceiling: RowCeiling | None = None


@dataclass(frozen=True)
class Placement:
    """Where a module's part of the model lies, and how it runs there; by default all of it, on one process.

    sequence: which positions are here. tp: this rank's share of heads, of the features of dense feed-forwards and of
    the vocabulary. attention_core: what attends where sequences are cut; None = `ops.attention`.
    recompute: what runs again in backward, "none", "selective" or "full". compiled: blocks are compiled.
    label: the module's name, for errors.
    """

    sequence: SequenceShards = field(default_factory=SequenceShards)
    tp: Share = Share()
    experts: ExpertPlacement = ExpertPlacement()
    attention_core: nn.Module | None = None
    recompute: str = "none"
    compiled: bool = False
    label: str = ""

    @property
    def call_eagerly(self) -> Callable[..., Any]:
        """Call a function as `call` does, outside of what `torch.compile` makes of its surroundings."""
        return _uncompiled_call() if self.compiled else call


@runtime_checkable
class Attachable(Protocol):
    """A module that takes part in parallelism."""

    def attach(self, placement: Placement) -> None:
        """Learn where this module's part of the model lies; its weights may be cut before or afterwards."""


def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call the function with the arguments."""
    return function(*arguments, **named)


@cache
def _uncompiled_call() -> Callable[..., Any]:
    """Make it once: each one more would have every block compiled anew."""
    return torch.compiler.disable(call)
