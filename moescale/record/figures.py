"""The keys of a run's figures: what each is, how it is made, and how it is read out of a line of `metrics.jsonl`.

A figure of the whole run bears its name alone, one of all mixtures is `moe/NAME`, and one of a single mixture is
`moe/layer_NN/NAME`, NN being its block's index. A name that is in none of the tables below cannot be made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Line = Mapping[str, Any]  # a step's figures by their keys
LARGEST = 1e30  # beyond that a number is damage, and could not be drawn
LARGEST_COUNT = 1 << 53


@dataclass(frozen=True)
class Figure:
    """meaning: with the unit. shape: what the lists run over, from outside to inside; () = one number."""

    meaning: str
    shape: tuple[str, ...] = ()


OF_RUN = {
    "step": Figure("steps done, from 1; every line has it"),
    "tokens": Figure("tokens seen so far"),
    "epoch": Figure("how often the text has been seen"),
    "loss": Figure("cross entropy of this step, nats per token"),
    "loss_max": Figure("the largest cross entropy of a step since the line before"),
    "load_balance_loss": Figure("before its coefficient, per token and layer; 1 = balanced"),
    "router_z_loss": Figure("before its coefficient, per token and layer"),
    "grad_norm": Figure("before clipping"),
    "lr": Figure("learning rate of this step"),
    "tokens_per_second": Figure("of all ranks, a mean since the line before"),
    "time": Figure("seconds since 1970"),
    "seconds": Figure("since the run was started or went on"),
    "memory_bytes": Figure("the most that a rank has taken so far"),
    "mfu": Figure("model FLOPs over the devices' peak, where that is known"),
    "eval_loss": Figure("held-out cross entropy, nats per token"),
    "eval_bits_per_byte": Figure("the same, over the bytes of the text"),
    "rollbacks": Figure("times that the run went back, where it may"),
    "alerts": Figure("what has newly gone wrong", ("texts",)),
}
OF_ALL = {
    "max_load": Figure("rows of the busiest expert over its layer's mean, the largest of all layers"),
    "min_load": Figure("rows of the idlest expert over its layer's mean, the smallest of all layers"),
    "max_violation": Figure("largest load over the mean, less one, a mean over layers (Wang et al., 2024, eq. 4)"),
    "load_cv": Figure("standard deviation of the load over its mean, a mean over layers"),
    "dead_experts": Figure("experts without a row"),
    "dropped_share": Figure("mean over layers"),
    "entropy": Figure("mean over layers"),
    "confidence": Figure("mean over layers"),
    "capacity_used": Figure("mean over layers"),
    "other_ranks": Figure("mean over layers"),
    "other_nodes": Figure("mean over layers"),
    "bytes_sent": Figure("sum over layers"),
    "moved": Figure("mean over layers"),
    "rows_between_ranks": Figure("rows that dispatch sent from ranks to ranks, those that stayed on the diagonal",
                                 ("blocks", "blocks")),
}
PICTURES = {  # that Weights & Biases alone gets
    "load_map": Figure("load of each layer and expert", ("picture",)),
    "load_history": Figure("load of each layer's busiest expert over time", ("picture",)),
    "load_histogram": Figure("load of all experts", ("picture",)),
    "expert_bias_histogram": Figure("bias of all experts", ("picture",)),
}
OF_LAYER = {
    "tokens_per_expert": Figure("rows of each expert", ("experts",)),
    "max_load": Figure("rows of the busiest expert over the mean; for Weights & Biases alone"),
    "dropped": Figure("choices without a row; of expert_choice, tokens without one"),
    "dropped_share": Figure("of what could be dropped"),
    "entropy": Figure("of the router's probabilities, nats per token"),
    "confidence": Figure("a token's largest probability, a mean"),
    "load_balance_loss": Figure("per token"),
    "router_z_loss": Figure("per token"),
    "surplus": Figure("rows that took a further pass, where there is a row budget"),
    "capacity_used": Figure("rows over slots, where there is a capacity"),
    "other_ranks": Figure("share of tokens that travel to other ranks, where experts are spread"),
    "other_nodes": Figure("share of tokens that travel to other nodes, where experts are spread"),
    "bytes_sent": Figure("what dispatch sent to other ranks; combine sends as much back, and backward both again"),
    "expert_bias": Figure("of each expert, where the router has one", ("experts",)),
    "moved": Figure("share of followed held-out tokens of which not all experts are those of the last look"),
}
_LAYER = re.compile(r"moe/layer_([0-9]+)/(\w+)")


def of_all(name: str) -> str:
    """Make the key of a figure of all mixtures."""
    assert name in OF_ALL or name in PICTURES, name
    return f"moe/{name}"


def of_layer(name: str, layer: int) -> str:
    """Make the key of one mixture's figure. layer: its block's index."""
    assert name in OF_LAYER, name
    return f"moe/layer_{layer:02d}/{name}"


def pattern_of_layers(name: str) -> str:
    """Make the regular expression that matches a figure of every mixture."""
    assert name in OF_LAYER, name
    return f"moe/layer_[0-9]+/{name}"


def parse(key: str) -> tuple[str, int | None]:
    """Split a key into its name and its block's index, None for a figure of the run or of all mixtures."""
    match = _LAYER.fullmatch(key)
    return (match[2], int(match[1])) if match else (key.removeprefix("moe/"), None)


def figure(key: str) -> Figure:
    """Look up what a key is. Raises KeyError for one that no run writes."""
    name, layer = parse(key)
    if layer is not None:
        return OF_LAYER[name]
    return (OF_ALL | PICTURES)[name] if key.startswith("moe/") else OF_RUN[name]


def by_layer(line: Line, name: str) -> dict[int, Any]:
    """Read one figure of all mixtures, as the run itself wrote it, by the block's index."""
    parsed = ((parse(key), value) for key, value in line.items())
    return {layer: value for (found, layer), value in parsed if layer is not None and found == name}


@dataclass(frozen=True, order=True)
class ExpertLoad:
    """How busy an expert is. load: rows over the mean of the layer's experts. layer: the block's index."""

    load: float
    layer: int
    expert: int


def expert_loads(line: Line) -> list[ExpertLoad]:
    """List the experts of all mixtures that have rows, the idlest first."""
    loads = []
    for layer, counts in by_layer(line, "tokens_per_expert").items():
        if any(counts):
            mean = sum(counts) / len(counts)
            loads += [ExpertLoad(count / mean, layer, expert) for expert, count in enumerate(counts)]
    return sorted(loads)


def numbers(line: Line) -> dict[str, float]:
    """Take what is one finite number of a size that can be drawn, of a line that may be damaged."""
    return {key: float(value) for key, value in line.items() if _is_number(value)}


def counts_of(line: Line, layer: int, num_experts: int) -> list[int] | None:
    """Take the rows of a layer's experts of a line that may be damaged, None where it has no such list."""
    row = line.get(of_layer("tokens_per_expert", layer))
    if isinstance(row, list) and len(row) == num_experts and all(map(_is_count, row)):
        return row
    return None


def counts_of_all(line: Line, layers: Sequence[int], num_experts: int) -> np.ndarray | None:
    """Take the rows of each expert, [layers, experts] float32, None where a layer's are missing or there is none."""
    rows = [counts_of(line, layer, num_experts) for layer in layers]
    return np.array(rows, np.float32) if rows and None not in rows else None


def alerts(line: Line) -> list[str]:
    """Take the alerts of a line that may be damaged."""
    texts = line.get("alerts")
    return [text for text in texts if isinstance(text, str)] if isinstance(texts, list) else []


def rows_between_ranks(line: Line) -> np.ndarray:
    """Take the rows between blocks of ranks, [blocks, blocks] float64; [0, 0] where there are none."""
    rows = line.get(of_all("rows_between_ranks"))
    square = isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == len(rows) and all(map(_is_count, row)) for row in rows)
    return np.array(rows, float).reshape(len(rows), -1) if square and rows else np.zeros((0, 0))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def _is_count(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < LARGEST_COUNT
