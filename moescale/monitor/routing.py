"""Walks the MoE layers and brings their counts together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from moescale.moe.layer import MoELayer


def reset_statistics(model: nn.Module) -> None:
    """Begin to count anew in every MoE layer."""
    for _, layer in _layers(model):
        layer.statistics.reset()


def routing_metrics(model: nn.Module, group: dist.ProcessGroup | None) -> dict[str, list[int] | int]:
    """Add up the counts of all ranks since the last reset, in one collective.

    -> `moe/layer_NN/tokens_per_expert`: rows of each expert; `moe/layer_NN/dropped`. NN is the block's index.
    """
    layers = _layers(model)
    if not layers:
        return {}
    statistics = [layer.statistics for _, layer in layers]
    counts = torch.stack([torch.cat((s.tokens_per_expert, s.dropped.view(1))) for s in statistics])
    if group is not None:
        dist.all_reduce(counts, group=group)
    metrics: dict[str, list[int] | int] = {}
    for (index, _), row in zip(layers, counts.tolist(), strict=True):
        metrics[f"moe/layer_{index:02d}/tokens_per_expert"] = row[:-1]
        metrics[f"moe/layer_{index:02d}/dropped"] = row[-1]
    return metrics


def load_range(metrics: dict[str, list[int] | int]) -> tuple[float, float]:
    """Find the busiest and the idlest expert of all layers. -> their loads over their layer's mean"""
    loads = [value for value in metrics.values() if isinstance(value, list) and any(value)]
    if not loads:
        return 1.0, 1.0
    return (
        max(max(counts) * len(counts) / sum(counts) for counts in loads),
        min(min(counts) * len(counts) / sum(counts) for counts in loads),
    )


def _layers(model: nn.Module) -> list[tuple[int, MoELayer]]:
    """MoE layers with the index of their block."""
    return [
        (next(int(part) for part in name.split(".") if part.isdigit()), module)
        for name, module in model.named_modules() if isinstance(module, MoELayer)
    ]
