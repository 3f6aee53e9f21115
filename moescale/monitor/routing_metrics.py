"""Walks the MoE layers and brings their counts together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moescale.moe.layer import MoELayer
from moescale.moe.routers import SigmoidBiasRouter
from moescale.moe.statistics import COUNTS, SUMS

BLOCKS = 32  # ranks, or blocks of ranks in a row, between which rows are counted
FACTS = ("copies", "budgets", "spread", "biases", "bytes_sent")  # ranks that hold the layer, and so on
WHOLE = ("tokens_per_expert", "dropped")  # whole numbers, the same in every layout
Value = int | float | list[int] | list[float] | list[list[int]]


def watch(model: nn.Module, on: bool) -> None:
    """Let the layers look closely at the steps to come, or count their load alone, which costs less."""
    for _, layer in layers(model):
        layer.statistics.watching = on


def routing_metrics(
    model: nn.Module, group: dist.ProcessGroup | None, *, num_layers: int, num_experts: int
) -> dict[str, Any]:
    """Add up the counts of all ranks in the last step, in one collective of one tensor.

    model: this rank's blocks, by their index. num_layers: of the whole model.
    -> of each layer `moe/layer_NN/...` as `_layer_metrics` says, NN being the block's index; of the model `moe/...` as
    `_summary` says; where experts are spread, `moe/rows_between_ranks`, [blocks][blocks], the rows that dispatch sent
    from ranks to ranks, those that stayed on the diagonal.
    """
    device, ranks = next(model.parameters()).device, 1 if group is None else dist.get_world_size(group)
    rank, blocks = 0 if group is None else dist.get_rank(group), min(ranks, BLOCKS)
    rows = torch.zeros(num_layers, 2 * num_experts + len(COUNTS) + len(SUMS) + len(FACTS), dtype=torch.float64,
                       device=device)
    sent = [[0] * blocks for _ in range(blocks)]
    for index, layer in layers(model):
        rows[index] = _row(layer, rank)
        for receiver, number in layer.statistics.sent.items():
            sent[rank * blocks // ranks][receiver * blocks // ranks] += number
    packed = torch.cat((rows.flatten(), rows.new_tensor(sent).flatten()))
    if group is not None:
        dist.all_reduce(packed, group=group)
    host = packed.cpu()  # the one time that the host waits for the device
    metrics: dict[str, Any] = {}
    for index, row in enumerate(host[: rows.numel()].view_as(rows).tolist()):
        of_layer = _layer_metrics(row, num_experts)
        metrics.update({f"moe/layer_{index:02d}/{key}": value for key, value in of_layer.items()})
    metrics.update(_summary(metrics))
    if "moe/other_ranks" in metrics:
        metrics["moe/rows_between_ranks"] = host[rows.numel() :].long().view(blocks, blocks).tolist()
    return metrics


def _row(layer: MoELayer, rank: int) -> Tensor:
    """What this rank knows of a layer. -> [columns] float64: load, counts, sums, facts, biases"""
    statistics, router = layer.statistics, layer.router
    bias = router.expert_bias if isinstance(router, SigmoidBiasRouter) else None
    away = sum(number for receiver, number in statistics.sent.items() if receiver != rank)
    facts = (1, layer.budget is not None, statistics.elsewhere is not None, bias is not None,
             away * statistics.row_bytes)
    load, sums = statistics.tokens_per_expert.double(), statistics.sums
    return torch.cat((load, statistics.counts.double(), sums, sums.new_tensor(facts),
                      torch.zeros_like(load) if bias is None else bias.double()))


def _layer_metrics(row: list[float], num_experts: int) -> dict[str, Value]:
    """Name one layer's figures of all ranks, none where there is no mixture.

    tokens_per_expert: rows of each expert. dropped: choices without a row, of expert_choice tokens without one.
    dropped_share: of what could be. entropy: of the router's probabilities, nats a token. confidence: its largest
    probability, a mean. load_balance_loss, router_z_loss: a token. surplus: rows that took a further pass, where there
    is a budget. capacity_used: rows over slots, where there is a capacity. other_ranks, other_nodes: share of tokens
    that travel there, where experts are spread; bytes_sent: what dispatch sent to other ranks; combine sends as many
    back, and backward both again. expert_bias: where there is one.
    """
    load, rest = [int(count) for count in row[:num_experts]], iter(row[num_experts:])
    counts, sums, facts = ({name: next(rest) for name in names} for names in (COUNTS, SUMS, FACTS))
    if not facts["copies"]:
        return {}
    tokens = max(1.0, counts["tokens"])
    metrics: dict[str, Value] = {
        "tokens_per_expert": load, "dropped": int(counts["dropped"]),
        "dropped_share": _short(counts["dropped"] / max(1.0, counts["wanted"])),
        **{name: _short(sums[name] / tokens) for name in SUMS[:4]},
    }
    if facts["budgets"]:
        metrics["surplus"] = int(counts["surplus"])
    if sums["slots"]:
        metrics["capacity_used"] = _short(sum(load) / sums["slots"])
    if facts["spread"]:
        metrics.update({key: _short(counts[key] / tokens) for key in ("other_ranks", "other_nodes")})
        metrics["bytes_sent"] = int(facts["bytes_sent"])
    if facts["biases"]:
        metrics["expert_bias"] = [_short(bias / facts["biases"]) for bias in rest]
    return metrics


def _summary(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Bring the layers to one figure each; keys as in a layer are means over the layers.

    moe/max_load, min_load: of an expert, over its layer's mean, the largest and the smallest of all. max_violation: the
    largest over the mean, less one, a mean over layers (Wang et al., 2024, eq. 4). load_cv: standard deviation over
    mean, a mean over layers. dead_experts: experts without a row. bytes_sent: of all layers.
    """
    by_layer = [[count * len(counts) / sum(counts) for count in counts]
                for counts in values(metrics, "tokens_per_expert").values() if any(counts)]
    if not by_layer:
        return {}
    summary: dict[str, float] = {
        "max_load": max(map(max, by_layer)), "min_load": min(map(min, by_layer)),
        "max_violation": sum(max(loads) - 1 for loads in by_layer) / len(by_layer),
        "load_cv": sum(math.sqrt(sum((load - 1) ** 2 for load in loads) / len(loads)) for loads in by_layer)
        / len(by_layer),
        "dead_experts": sum(loads.count(0) for loads in by_layer),
    }
    for key in ("dropped_share", "entropy", "confidence", "capacity_used", "other_ranks", "other_nodes"):
        each = values(metrics, key).values()
        if each:
            summary[key] = sum(each) / len(each)
    if "other_ranks" in summary:
        summary["bytes_sent"] = sum(values(metrics, "bytes_sent").values())
    return {f"moe/{key}": _short(value) for key, value in summary.items()}


def values(metrics: Mapping[str, Any], quantity: str) -> dict[int, Any]:
    """Read one quantity of all layers out of the metrics. -> by the block's index"""
    return {int(key.split("/")[1].removeprefix("layer_")): value for key, value in metrics.items()
            if key.startswith("moe/layer_") and key.endswith(f"/{quantity}")}


def _short(number: float) -> float:
    """Keep seven digits, so that lines stay short."""
    return float(f"{number:.7g}")


@dataclass(frozen=True, order=True)
class ExpertLoad:
    """load: rows over the mean of the layer's experts. layer: the block's index."""

    load: float
    layer: int
    expert: int


def expert_loads(metrics: Mapping[str, Any]) -> list[ExpertLoad]:
    """Read the experts of all layers out of the metrics, the idlest first. -> one for each expert of each layer"""
    loads = []
    for layer, counts in values(metrics, "tokens_per_expert").items():
        if any(counts):
            mean = sum(counts) / len(counts)
            loads += [ExpertLoad(count / mean, layer, expert) for expert, count in enumerate(counts)]
    return sorted(loads)


def layers(model: nn.Module) -> list[tuple[int, MoELayer]]:
    """MoE layers with the index of their block."""
    return [
        (next(int(part) for part in name.split(".") if part.isdigit()), module)
        for name, module in model.named_modules() if isinstance(module, MoELayer)
    ]
