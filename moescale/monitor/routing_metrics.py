"""Names the figures of a step's routing, as `record/figures.py` describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moescale.engine.base import LayerCounts, RoutingCounts
from moescale.record.figures import by_layer, of_all, of_layer

WHOLE = ("tokens_per_expert", "dropped")  # whole numbers, the same in every layout
Value = int | float | list[int] | list[float] | list[list[int]]


def routing_metrics(routing: RoutingCounts) -> dict[str, Any]:
    """Give every figure its key: those of each layer, and those of all layers together."""
    metrics: dict[str, Any] = {}
    for index, layer in routing.layers.items():
        metrics.update({of_layer(name, index): value for name, value in _layer_metrics(layer).items()})
    metrics.update(_summary(metrics))
    if of_all("other_ranks") in metrics:
        metrics[of_all("rows_between_ranks")] = routing.rows_between_ranks
    return metrics


def _layer_metrics(layer: LayerCounts) -> dict[str, Value]:
    """Compute one layer's figures by their names in `OF_LAYER`."""
    tokens = max(1, layer.tokens)
    metrics: dict[str, Value] = {
        "tokens_per_expert": layer.tokens_per_expert, "dropped": layer.dropped,
        "dropped_share": _short(layer.dropped / max(1, layer.wanted)),
        "entropy": _short(layer.entropy / tokens), "confidence": _short(layer.confidence / tokens),
        "load_balance_loss": _short(layer.load_balance_loss / tokens),
        "router_z_loss": _short(layer.router_z_loss / tokens),
    }
    if layer.surplus is not None:
        metrics["surplus"] = layer.surplus
    if layer.slots:
        metrics["capacity_used"] = _short(sum(layer.tokens_per_expert) / layer.slots)
    for key in ("other_ranks", "other_nodes"):
        number = getattr(layer, key)
        if number is not None:
            metrics[key] = _short(number / tokens)
    if layer.bytes_sent is not None:
        metrics["bytes_sent"] = layer.bytes_sent
    if layer.expert_bias is not None:
        metrics["expert_bias"] = [_short(bias) for bias in layer.expert_bias]
    return metrics


def _summary(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Bring the layers to one figure each, by their keys; `OF_ALL` says how."""
    relative = [[count * len(counts) / sum(counts) for count in counts]
                for counts in by_layer(metrics, "tokens_per_expert").values() if any(counts)]
    if not relative:
        return {}
    summary: dict[str, float] = {
        "max_load": max(map(max, relative)), "min_load": min(map(min, relative)),
        "max_violation": sum(max(loads) - 1 for loads in relative) / len(relative),
        "load_cv": sum(math.sqrt(sum((load - 1) ** 2 for load in loads) / len(loads)) for loads in relative)
        / len(relative),
        "dead_experts": sum(loads.count(0) for loads in relative),
    }
    for key in ("dropped_share", "entropy", "confidence", "capacity_used", "other_ranks", "other_nodes"):
        each = by_layer(metrics, key).values()
        if each:
            summary[key] = sum(each) / len(each)
    if "other_ranks" in summary:
        summary["bytes_sent"] = sum(by_layer(metrics, "bytes_sent").values())
    return {of_all(key): _short(value) for key, value in summary.items()}


def _short(number: float) -> float:
    """Keep seven digits, so that lines stay short."""
    return float(f"{number:.7g}")
