"""Tokens out to the ranks of their experts, answers back. What combine needs travels in the handle.

| dispatcher   | legs                                          | a token travels                                   |
|--------------|-----------------------------------------------|---------------------------------------------------|
| local        | none: all experts are on this rank            | not                                               |
| all_to_all   | among all ranks that share the experts        | to each rank of its experts, once                 |
| hierarchical | among the nodes, then within the node         | to each node of its experts once, to a rank once  |
| all_gather   | as all_to_all, but every rank gets all tokens | to every rank, in one gather: for few ranks       |

All of them give the same results. A rank with several of a token's experts sends one row back, weighed and added up.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from torch import Tensor

from moescale.comm.exchange import Walk
from moescale.moe.hops import Hop, Way
from moescale.moe.routing import Routing


@dataclass(frozen=True)
class Handle:
    """How tokens came to this rank, leg by leg: what `combine` undoes."""

    ways: tuple[Way, ...]


class Dispatcher:
    """Two calls do all communication of a mixture of experts. Each pauses while rows are under way."""

    def __init__(self, hops: Sequence[Hop] = ()) -> None:
        self.hops = tuple(hops)

    def dispatch(self, x: Tensor, routing: Routing) -> Generator[None, None, tuple[Tensor, Routing, Handle]]:
        """x: [tokens, d_model]. -> [received, d_model]; their Routing among this rank's experts; the handle"""
        ways = []
        for hop in self.hops:
            x, routing, way = yield from hop.out(x, routing)
            ways.append(way)
        return x, routing, Handle(tuple(ways))

    def combine(self, y: Tensor, handle: Handle) -> Walk:
        """y: [received, d_model], what this rank's experts add to each token. -> [tokens, d_model]"""
        for hop, way in zip(reversed(self.hops), reversed(handle.ways), strict=True):
            y = yield from hop.back(y, way)
        return y
