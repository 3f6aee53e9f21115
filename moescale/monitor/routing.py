"""Walks the MoE layers and brings their counts together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moescale.moe.layer import MoELayer


def routing_metrics(
    model: nn.Module, group: dist.ProcessGroup | None, *, num_layers: int, num_experts: int
) -> dict[str, list[int] | int]:
    """Add up the counts of all ranks in the last step, in one collective.

    model: this rank's blocks, by their index. num_layers: of the whole model.
    -> `moe/layer_NN/tokens_per_expert`: rows of each expert; `moe/layer_NN/dropped`; where there is a budget,
    `moe/layer_NN/surplus`, rows that took a further pass. NN is the block's index.
    """
    counts = torch.zeros(num_layers, num_experts + 4, dtype=torch.int64, device=next(model.parameters()).device)
    for index, layer in _layers(model):  # the last columns tell which are mixtures, and have a budget
        statistics, marks = layer.statistics, counts.new_tensor([1, int(layer.budget is not None)])
        numbers = torch.stack((statistics.dropped, statistics.surplus))
        counts[index] = torch.cat((statistics.tokens_per_expert, numbers, marks))
    if group is not None:
        dist.all_reduce(counts, group=group)
    metrics: dict[str, list[int] | int] = {}
    for index, (*tokens_per_expert, dropped, surplus, mixture, budget) in enumerate(counts.tolist()):
        if mixture:
            metrics[f"moe/layer_{index:02d}/tokens_per_expert"] = tokens_per_expert
            metrics[f"moe/layer_{index:02d}/dropped"] = dropped
        if budget:
            metrics[f"moe/layer_{index:02d}/surplus"] = surplus
    return metrics


@dataclass(frozen=True, order=True)
class ExpertLoad:
    """load: rows over the mean of the layer's experts. layer: the block's index."""

    load: float
    layer: int
    expert: int


def expert_loads(metrics: Mapping[str, Any]) -> list[ExpertLoad]:
    """Read the experts of all layers out of the metrics, the idlest first. -> one for each expert of each layer"""
    loads = []
    for key, counts in metrics.items():
        if key.startswith("moe/layer_") and key.endswith("/tokens_per_expert") and any(counts):
            layer, mean = int(key.split("/")[1].removeprefix("layer_")), sum(counts) / len(counts)
            loads += [ExpertLoad(count / mean, layer, expert) for expert, count in enumerate(counts)]
    return sorted(loads)


def _layers(model: nn.Module) -> list[tuple[int, MoELayer]]:
    """MoE layers with the index of their block."""
    return [
        (next(int(part) for part in name.split(".") if part.isdigit()), module)
        for name, module in model.named_modules() if isinstance(module, MoELayer)
    ]
