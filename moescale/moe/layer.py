"""A mixture of experts as a channel mixer: route, dispatch, experts, combine."""

from __future__ import annotations

from torch import Tensor, nn

from moescale.layers.feed_forward import FeedForward
from moescale.moe.dispatchers import Dispatcher, LocalDispatcher
from moescale.moe.experts import Experts
from moescale.moe.routers import Router
from moescale.moe.statistics import Statistics


class MoELayer(nn.Module):
    """Send each token to a few experts and add up their answers.

    shared: what all tokens use besides, on the rank where they are, several experts as one (DeepSeekMoE, sec. 3.2).
    """

    dispatcher: Dispatcher

    def __init__(self, router: Router, experts: Experts, shared: FeedForward | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.dispatcher = LocalDispatcher()
        self.statistics = Statistics(router.num_experts)

    def forward(self, x: Tensor, serial: Tensor) -> tuple[Tensor, Tensor]:
        """x: [batch, seq/cp/tp, d_model]; a sequence is a routing group. serial: [batch, seq] int64, -1 = padding.

        -> like x; [2] float32: load-balance and router z-loss, summed over own valid tokens
        """
        routing, losses = self.router(x, serial)
        rows, tokens_per_expert, handle = self.dispatcher.dispatch(x.flatten(0, 1), routing)
        rows = self.experts(rows, tokens_per_expert)
        y = self.dispatcher.combine(rows, routing, handle).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x, serial)[0]
        if self.training:
            self.statistics.add(routing, self.router.dropped(routing, self.router.sequence.own(serial) >= 0))
        return y, losses
