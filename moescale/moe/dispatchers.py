"""Sends tokens to the ranks of their experts, and outputs back. What combine needs travels in the handle.

| dispatcher   | hops                                          | a token travels                                   |
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

from moescale.comm.exchange import Pausing
from moescale.moe.hops import Hop, HopHandle
from moescale.moe.routing import Routing


@dataclass(frozen=True)
class DispatchHandle:
    """How tokens came to this rank, hop by hop: what `combine` needs to undo it."""

    hops: tuple[HopHandle, ...]


class Dispatcher:
    """Does all communication of a mixture of experts in two calls, each of which pauses while rows are under way."""

    def __init__(self, hops: Sequence[Hop] = ()) -> None:
        self.hops = tuple(hops)

    def dispatch(self, x: Tensor, routing: Routing) -> Generator[None, None, tuple[Tensor, Routing, DispatchHandle]]:
        """Send tokens to the ranks of their experts.

        x: [tokens, d_model]. -> [received, d_model]; their Routing among this rank's experts; the handle for `combine`
        """
        handles = []
        for hop in self.hops:
            x, routing, handle = yield from hop.dispatch(x, routing)
            handles.append(handle)
        return x, routing, DispatchHandle(tuple(handles))

    def combine(self, y: Tensor, handle: DispatchHandle) -> Pausing:
        """Bring outputs back and sum each token's.

        y: [received, d_model], what this rank's experts add to each token. -> [tokens, d_model]
        """
        for hop, hop_handle in zip(reversed(self.hops), reversed(handle.hops), strict=True):
            y = yield from hop.combine(y, hop_handle)
        return y
