"""What Megatron's routers do, counted and shown in the terms of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescale.engine.base import Choices
from moescale.moe.layer import MoELayer
from moescale.moe.routers import SigmoidBiasRouter


class WatchedRouter:
    """Computes from what a router of Megatron's sees the losses that ours would sum, and counts what it chose.

    theirs: takes [seq, batch, d_model], gives weights and choices, both [seq x batch, experts]. layer: ours, without
    weights, whose statistics are counted.
    """

    def __init__(self, index: int, theirs: nn.Module, layer: MoELayer, device: torch.device) -> None:
        self.index, self.theirs, self.layer = index, theirs, layer
        self.losses: Tensor | None = None
        self.token_id = torch.empty(0)
        self.takers: list[tuple[bool, Callable[[Choices], None]]] = []
        layer.statistics.to_empty(device=device)
        if isinstance(layer.router, SigmoidBiasRouter):
            layer.router.register_buffer("expert_bias", theirs.get_buffer("expert_bias"))
        theirs.register_forward_hook(self._see)

    def begin(self, losses: Tensor) -> None:
        """Begin a step. losses: [2], to which balance and router z-loss of own tokens are added"""
        self.losses = losses

    def take(self, token_id: Tensor) -> None:
        """Know the tokens of the pass to come. token_id: [batch, seq] int64, -1 = padding"""
        self.token_id = token_id

    @contextmanager
    def shown(self, training: bool, taker: Callable[[Choices], None]) -> Iterator[None]:
        """Show the choices of each pass."""
        entry = (training, taker)
        self.takers.append(entry)
        try:
            yield
        finally:
            self.takers.remove(entry)

    @torch.no_grad()
    def _see(self, theirs: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor]) -> None:
        weight, chosen = (output.unflatten(0, inputs[0].shape[:2]).transpose(0, 1) for output in outputs)
        matrix = theirs.get_parameter("weight").float()
        logits = F.linear(inputs[0].float(), matrix).transpose(0, 1).contiguous()  # [batch, seq, experts]
        router, statistics = self.layer.router, self.layer.statistics
        probs, valid = router.probabilities(logits), self.token_id >= 0
        if theirs.training and self.losses is not None:
            losses = router.settle(logits, self.token_id, valid)[3].double()  # shows the statistics its probabilities
            self.losses.add_(losses)
            load, tokens = chosen.sum((0, 1)), valid.sum()
            none = torch.zeros_like(tokens)
            statistics.tokens_per_expert.add_(load)
            statistics.counts[:4].add_(torch.stack((none, none, tokens, router.wanted_rows(tokens))))
            statistics.sums[2:4].add_(losses)
        for training, taker in self.takers:
            if training == theirs.training:
                expert = chosen.float().topk(router.top_k).indices
                taker(Choices(self.index, self.token_id.flatten(), expert.flatten(0, 1).masked_fill(
                    ~valid.flatten().unsqueeze(1), -1), weight.gather(-1, expert).flatten(0, 1).float(),
                    probs.flatten(0, 1), logits.flatten(0, 1)))
