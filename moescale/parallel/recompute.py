"""Recompute: keep less of the forward pass and run parts of it again in backward. Changes memory and time alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from moescale.layers.feed_forward import FeedForward
from moescale.model.block import Block
from moescale.moe.experts import Experts
from moescale.moe.routing_statistics import Uncounted
from moescale.parallel.expert import moe_layers


def recompute(model: nn.Module, extent: str) -> None:
    """Make the model run parts again in backward.

    extent: "selective" for feed-forwards and experts, whose hidden features take most memory and whose second run sends
    nothing; "full" for whole blocks, their communication included.
    """
    kinds: tuple[type[nn.Module], ...] = (Block,) if extent == "full" else (FeedForward, Experts)
    for module in model.modules():
        if isinstance(module, kinds):
            again = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            # the smaller parts count nothing, and may be compiled, where such contexts are not taken
            module.forward = partial(again, context_fn=partial(_contexts, module)) if extent == "full" else again


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Make the contexts of the first run, and of the second."""
    return nullcontext(), Uncounted([layer.statistics for layer in moe_layers(module)])
