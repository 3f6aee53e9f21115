"""A mixture of experts as a channel mixer: route, dispatch, experts, combine, shared experts."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from moescale.comm.exchange import Pausing, Result, take_turns
from moescale.comm.placement import Placement, call
from moescale.layers.feed_forward import FeedForward
from moescale.moe.budget import RowBudget
from moescale.moe.dispatchers import Dispatcher
from moescale.moe.experts import Experts
from moescale.moe.hops import Hop
from moescale.moe.routers import Router
from moescale.moe.routing import Routing
from moescale.moe.routing_statistics import Statistics, Uncounted


class MoELayer(nn.Module):
    """Send each token to a few experts and add up their answers.

    shared: what all tokens use besides, on the rank where they are, several experts as one (DeepSeekMoE, sec. 3.2).
    chunks: the tokens travel in so many parts, and while one travels the experts compute another.
    budget: how many rows the experts take at a time; None = all.
    """

    def __init__(self, router: Router, experts: Experts, shared: FeedForward | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.dispatcher, self.chunks = Dispatcher(), 1
        self.budget: RowBudget | None = None
        self.statistics = Statistics(router.num_experts)
        self.call_mixture = call
        router.observe(self.statistics.add_probabilities)

    def attach(self, placement: Placement) -> None:
        experts = placement.experts
        self.dispatcher = Dispatcher([Hop(hop.group, etp=hop.etp, to_all=hop.to_all, label=placement.label + hop.where)
                                      for hop in experts.hops])
        self.chunks = experts.chunks
        if (ceiling := experts.ceiling) is not None:
            self.budget = RowBudget(ceiling.share, self.router.top_k, ceiling.drop, experts.group, experts.etp.size,
                                    ceiling.replica_groups)
        self.call_mixture = placement.call_eagerly  # it looks at numbers on the host, and sends

    def forward(self, x: Tensor, token_id: Tensor) -> tuple[Tensor, Tensor]:
        """Let each token's experts answer.

        x: [batch, seq/cp/tp, d_model]; a sequence is a routing group. token_id: [batch, seq] int64, -1 = padding.
        Returns features like x; [2] float32: load-balance and router z-loss, summed over own valid tokens.
        """
        return self.call_mixture(self._route_and_mix, x, token_id)

    def _route_and_mix(self, x: Tensor, token_id: Tensor) -> tuple[Tensor, Tensor]:
        with record_function("route"):
            routing, losses = self.router(x, token_id)
        valid, token_id = token_id >= 0, self.router.sequence.own(token_id)
        if self.experts.dropout:
            routing = replace(routing, token_id=token_id.flatten())
        portions = [routing] if self.budget is None else self.budget.portions(routing, self.training)
        y = self._mix(x.flatten(0, 1), portions, token_id).view_as(x)
        if self.training:
            self.statistics.add(self.router, routing, portions, losses, valid)
        return y, losses

    def _mix(self, x: Tensor, portions: list[Routing], token_id: Tensor) -> Tensor:
        """x: [tokens, d_model]. -> like x"""
        if not self.training and not self.dispatcher.hops and len(portions) == 1:  # nothing travels or is counted
            y = self.experts(x, portions[0])
            return y if self.shared is None else y + self.shared(x, token_id)[0]
        tasks = []
        if len(portions) == 1:
            tokens = x.tensor_split(self.chunks) if self.chunks > 1 else (x,)  # the gradient of a part is a copy
            parts = zip(tokens, portions[0].split(self.chunks), strict=True)
            tasks = [self._mixture(*part) for part in parts]
        num_parts = len(tasks)
        if self.shared is not None:
            tasks.append(self._shared(x, token_id))
        answers = take_turns(tasks)
        if num_parts == 0:
            y = self._in_passes(x, portions)
        else:
            y = answers[0] if num_parts == 1 else torch.cat(answers[:num_parts])  # one, nearly always, needs no copy
        return y if self.shared is None else y + answers[-1]

    def _in_passes(self, x: Tensor, portions: list[Routing]) -> Tensor:
        """One after another, added up as they come, so that no more memory is needed for more of them."""
        total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for portion in portions:
            total = total + self._pass(x, portion)
        return total.to(x.dtype)

    def _pass(self, x: Tensor, routing: Routing) -> Tensor:
        """One of several: nothing is kept of it, so that in backward too the ceiling holds. x: [tokens, d_model]"""
        def run(x: Tensor) -> Tensor:
            return take_turns([self._mixture(x, routing)])[0]

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), Uncounted([self.statistics])

        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def _mixture(self, x: Tensor, routing: Routing) -> Pausing:
        """x: [tokens, d_model]. -> like x"""
        own = x
        x, routing, handle = yield from spanned("dispatch", self.dispatcher.dispatch(x, routing))
        self.statistics.travelled(handle, own)
        with record_function("experts"):
            y = self.experts(x, routing)
        return (yield from spanned("combine", self.dispatcher.combine(y, handle)))

    def _shared(self, x: Tensor, token_id: Tensor) -> Pausing:
        """Half of it while tokens are on their way out, half while they come back. x: [tokens, d_model]. -> like x"""
        assert self.shared is not None
        if not self.dispatcher.hops:
            return self.shared(x, token_id)[0]
        first, second = x.tensor_split(2)
        first = self.shared(first, token_id)[0]
        yield
        return torch.cat((first, self.shared(second, token_id)[0]))


def spanned(name: str, task: Generator[None, None, Result]) -> Generator[None, None, Result]:
    """Run a task; profilers show each stretch between pauses under the name. -> what the task returns"""
    while True:
        with record_function(name):
            try:
                next(task)
            except StopIteration as end:
                return end.value
        yield
