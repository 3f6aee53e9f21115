"""Routers that hold their choices to the global batch, which no rank sees whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moescale.comm.collectives import Group, all_reduce_sum
from moescale.config import Config
from moescale.model.language_model import LanguageModel
from moescale.moe.balance_scopes import GlobalBatchScope
from moescale.moe.layer import MoELayer


def count_as_it_goes(model: LanguageModel, group: Group) -> None:
    """Let each router add up its choices over the ranks that share the global batch, in the one pass that there is."""
    for scope in _scopes(model).values():
        scope.count_over(group)


@contextmanager
def choices_counted(model: LanguageModel, config: Config, group: Group) -> Iterator[None]:
    """Count the choices of all passes made within; then each router has those of all ranks, by one collective.

    group: all ranks, in a pipeline too, where each layer's row is zero on ranks that do not hold it.
    """
    scopes = _scopes(model)
    for scope in scopes.values():
        scope.begin_counting()
    yield
    counts = torch.zeros(config.model.num_layers, config.moe.num_experts, dtype=torch.int64,
                         device=next(model.parameters()).device)
    for index, scope in scopes.items():
        assert scope.counted is not None
        counts[index] = scope.counted
    all_reduce_sum(counts, group)
    for index, scope in scopes.items():
        scope.end_counting(counts[index : index + 1])


def _scopes(model: LanguageModel) -> dict[int, GlobalBatchScope]:
    """Find the scopes of all routers, by the index of their block, in order."""
    mixers = {int(index): block.channel_mixer for index, block in model.blocks.items()}
    return {index: mixer.router.scope for index, mixer in mixers.items()
            if isinstance(mixer, MoELayer) and isinstance(mixer.router.scope, GlobalBatchScope)}
