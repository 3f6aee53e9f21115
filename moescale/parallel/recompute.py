"""Recompute: keep less of the forward pass and run parts of it again in backward. Changes memory and time alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from moescale.layers.feed_forward import FeedForward
from moescale.model.block import Block
from moescale.moe.experts import Experts
from moescale.parallel.expert import moe_layers


def recompute(model: nn.Module, extent: str) -> None:
    """Make the model run parts again in backward.

    extent: "selective" for feed-forwards and experts, whose hidden features take most memory and whose second run sends
    nothing; "full" for whole blocks, their communication included.
    """
    kinds: tuple[type[nn.Module], ...] = (Block,) if extent == "full" else (FeedForward, Experts)
    for module in model.modules():
        if isinstance(module, kinds):
            again = partial(_uncounted, module)
            module.forward = partial(  # type: ignore[method-assign]
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda again=again: (nullcontext(), again()),
            )


@contextmanager
def _uncounted(module: nn.Module) -> Iterator[Any]:
    """Let statistics pass: what runs again was counted the first time."""
    statistics = [layer.statistics for layer in moe_layers(module)]
    for each in statistics:
        each.counting = False
    try:
        yield
    finally:
        for each in statistics:
            each.counting = True
