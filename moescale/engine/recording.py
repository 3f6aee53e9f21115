"""Shows what passes through the layers of a model while an engine runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moescale.engine.accounting import mixtures
from moescale.engine.base import Choices, Features
from moescale.model.block import Block
from moescale.model.language_model import LanguageModel
from moescale.moe.layer import MoELayer


class Shown(nn.Parameter):
    """A weight with its gradient, for others to look at, where an engine keeps both in another form."""

    @classmethod
    def make(cls, data: Tensor, grad: Tensor | None) -> Shown:
        parameter = cls(data)
        parameter.grad = grad
        return parameter


@contextmanager
def recording(
    model: LanguageModel, *, training: bool, choices: Callable[[Choices], None] | None = None,
    features: Callable[[Features], None] | None = None, gradients: Callable[[Features], None] | None = None,
) -> Iterator[None]:
    """Show each pass of this rank's layers, as `Engine.record` says."""
    with ExitStack() as shown:
        if choices is not None:
            for index, layer in mixtures(model).items():
                shown.enter_context(_choices(index, layer, choices, training))
        if features is not None or gradients is not None:
            for name, block in model.blocks.items():
                assert isinstance(block, Block)
                shown.enter_context(_features(int(name), block, features, gradients, training))
        yield


@contextmanager
def _choices(index: int, layer: MoELayer, take: Callable[[Choices], None], training: bool) -> Iterator[None]:
    router = layer.router
    probs: list[Tensor] = []
    scores: list[Tensor] = []

    def see_probs(each: Tensor, valid: Tensor) -> None:
        probs[:] = [each.detach().flatten(0, 1)]

    def see_scores(logits: Tensor) -> None:
        scores[:] = [logits.detach().flatten(0, 1)]

    def see(router: nn.Module, inputs: tuple[Tensor, Tensor], outputs: Any) -> None:
        if layer.statistics.counting and router.training == training == torch.is_grad_enabled():
            routing = outputs[0]
            none = routing.row < 0
            row = routing.row.clamp(min=0)
            expert, weight = routing.expert, routing.weight.detach()
            if not len(expert):  # no token here has any
                expert, weight = expert.new_zeros(1), weight.new_zeros(1)
            token_id = layer.router.sequence.own(inputs[1]).flatten()
            take(Choices(index, token_id, expert[row].masked_fill(none, -1), weight[row].masked_fill(none, 0),
                         probs.pop(), scores.pop() if scores else None))

    with ExitStack() as ends:
        ends.callback(router.observe(see_probs))
        ends.callback(router.observe_scores(see_scores))
        ends.callback(router.register_forward_hook(see).remove)
        yield


@contextmanager
def _features(
    index: int, block: Block, take: Callable[[Features], None] | None, take_grad: Callable[[Features], None] | None,
    training: bool,
) -> Iterator[None]:
    token_ids: list[Tensor] = []  # of the own tokens while the block runs; none in what recompute runs again

    def show(after: Literal["mixer", "channel_mixer"], token_id: Tensor, x: Tensor) -> None:
        if take is not None:
            take(Features(index, after, token_id, x.detach().flatten(0, 1)))
        if take_grad is not None and x.requires_grad:
            see = take_grad
            x.register_hook(lambda grad: see(Features(index, after, token_id, grad.flatten(0, 1))))

    def begin(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if block.training == training == torch.is_grad_enabled():
            token_ids[:] = [block.sequence.own(inputs[2]).flatten()]

    def mixed(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if token_ids:
            show("mixer", token_ids[0], inputs[0])

    def end(_: nn.Module, inputs: object, outputs: tuple[Tensor, Tensor]) -> None:
        if token_ids:
            show("channel_mixer", token_ids.pop(), outputs[0])

    hooks = [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
    if block.channel_norm is not None:
        hooks.append(block.channel_norm.register_forward_pre_hook(mixed))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
