"""Running sums of the routing, kept on the device, outside the gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moescale.comm.placement import Placement
from moescale.moe.dispatchers import DispatchHandle
from moescale.moe.routing import Routing

if TYPE_CHECKING:
    from moescale.moe.routers import Router

COUNTS = ("dropped", "surplus", "tokens", "wanted", "other_ranks", "other_nodes")
SUMS = ("entropy", "confidence", "load_balance_loss", "router_z_loss", "slots")


class Statistics(nn.Module):
    """Counts of one step, of this rank's tokens.

    tokens_per_expert: [experts] int64, counted in every step; the others only while `watching`.
    counts: int64, by COUNTS: choices without a row; rows that took a further pass; valid tokens; what may be dropped;
    tokens with an expert on another rank, and on another node.
    sums: float64, by SUMS: over valid tokens the entropy of the router's probabilities in nats, the largest of them and
    the two losses; the experts' slots where there is a capacity.
    sent: rows that dispatch sent from here, by rank of the world, this one included. row_bytes: of one of them.
    """

    tokens_per_expert: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("tokens_per_expert", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("counts", torch.zeros(len(COUNTS), dtype=torch.int64), persistent=False)
        self.register_buffer("sums", torch.zeros(len(SUMS), dtype=torch.float64), persistent=False)
        self.sent: Counter[int] = Counter()
        self.row_bytes = 0
        self.counting = True  # False while a part of the forward pass runs again in backward
        self.watching = True  # False in steps of which nobody reads more than the load
        self.away: list[tuple[bool, bool]] | None = None  # per expert: on another rank, on another node; None = here

    def attach(self, placement: Placement) -> None:
        if (away := placement.experts.away) is not None:
            local_experts = len(self.tokens_per_expert) // len(away)
            self.away = [home for home in away for _ in range(local_experts)]

    def watch(self, on: bool) -> None:
        """Count everything in the steps to come, or the load alone, which costs less."""
        self.watching = on

    def count(self, on: bool) -> None:
        """Count what runs from here on, or let it pass."""
        self.counting = on

    @property
    def dropped(self) -> Tensor:
        """Scalar int64."""
        return self.counts[COUNTS.index("dropped")]

    @property
    def surplus(self) -> Tensor:
        """Scalar int64, rows that took a further pass."""
        return self.counts[COUNTS.index("surplus")]

    @torch.no_grad()
    def add_probabilities(self, probs: Tensor, valid: Tensor) -> None:
        """See how sure the router is. probs: [groups, tokens, experts]. valid: [groups, tokens] bool"""
        if self.training and self.counting and self.watching:
            best, entropy = probs.amax(-1), torch.special.entr(probs).sum(-1)
            self.sums[:2] += (torch.stack((entropy, best)) * valid).sum((1, 2))

    @torch.no_grad()
    def add(
        self, router: Router, routing: Routing, portions: Sequence[Routing], losses: Tensor, valid_whole: Tensor
    ) -> None:
        """Count one pass of the model.

        portions: of its routing, as they were computed. losses: [2], the router's, summed over own tokens.
        valid_whole: [groups, seq] bool, of the whole sequences.
        """
        if not self.counting:
            return
        self.tokens_per_expert += torch.stack([portion.tokens_per_expert for portion in portions]).sum(0)
        if not self.watching:
            return
        valid = router.sequence.own(valid_whole)
        left_out = len(routing.token) - sum(len(portion.token) for portion in portions)
        surplus = sum(len(portion.token) for portion in portions[1:])
        tokens = valid.sum()
        self.counts[:4] += torch.stack((
            router.dropped(routing, valid) + left_out, torch.full_like(tokens, surplus), tokens,
            router.wanted_rows(tokens)))
        if self.away is not None:
            far = tokens.new_tensor(self.away)[routing.expert]  # [assignments, 2]
            per_token = far.new_zeros(len(routing.row), 2).index_add_(0, routing.token, far)
            self.counts[4:] += (per_token > 0).sum(0)
        self.sums[2:] += torch.cat((losses, router.total_slots(valid_whole).unsqueeze(0)))

    def travelled(self, handle: DispatchHandle, x: Tensor) -> None:
        """Count the rows that a dispatch sent, hop by hop. x: [tokens, d_model], what it sent rows of"""
        if self.training and self.counting and self.watching:
            self.row_bytes = x.shape[1] * x.element_size()
            for hop in handle.hops:
                self.sent.update(hop.rows_sent())

    def reset(self) -> None:
        self.sent.clear()
        for counts in self.buffers():
            counts.zero_()


class Uncounted(AbstractContextManager[None]):
    """Let statistics pass: what runs again was counted the first time. Entered once for each part of backward."""

    def __init__(self, statistics: Sequence[Statistics]) -> None:
        self.statistics = statistics

    def __enter__(self) -> None:
        for each in self.statistics:
            each.count(False)

    def __exit__(self, *error: object) -> None:
        for each in self.statistics:
            each.count(True)
