"""Small routers and layers of every kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from moescale.moe.experts import Experts
from moescale.moe.layer import MoELayer
from moescale.moe.routers import ROUTERS, Capacity, Router


@dataclass(frozen=True)
class Kind:
    """A router with its options. leaks: whether a token changes what becomes of earlier ones in training."""

    name: str
    top_k: int
    factor: float | None = None
    leaks: bool = False
    capacity: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join(map(str, (self.name, self.top_k, self.factor, *self.capacity.values(), *self.own.values())))


KINDS = [
    Kind("mixtral", 2), Kind("mixtral", 3, own={"normalize_weights": False}), Kind("sigmoid_bias", 2),
    Kind("expert_choice", 2, 1.7, leaks=True), Kind("switch", 1, 0.7), Kind("switch", 1, 1.25),
    Kind("switch", 1, 0.2, capacity={"least": 2}),
    Kind("switch", 1, 0.7, leaks=True, own={"left_behind_choices": 3}),
    Kind("switch", 1, 0.7, leaks=True, capacity={"by_probability": True}),
    Kind("gshard", 2, 0.6, leaks=True), Kind("gshard", 2, 9.0),
    Kind("gshard", 2, 0.6, leaks=True, capacity={"by_probability": True, "eval_factor": 0.8, "least": 2}),
    Kind("sinkhorn", 1, leaks=True), Kind("sinkhorn", 3, 0.7, leaks=True, capacity={"by_probability": True}),
    Kind("switch", 1, 0.5, leaks=True,
         capacity={"by_probability": True, "eval_factor": 0.6}, own={"left_behind_choices": 2}),
]


def make_router(kind: Kind, num_experts: int = 5, d_model: int = 8, balance_over: str = "sequence") -> Router:
    own: dict[str, Any] = {}
    if kind.name == "mixtral":
        own = {"normalize_weights": True}
    if kind.name == "switch":
        own = {"left_behind_choices": 1}
    if kind.name == "sigmoid_bias":
        own = {"num_expert_groups": 1, "top_k_groups": 1, "routed_scaling": 1.0, "bias_update_rate": 0.001}
    router = ROUTERS[kind.name](
        d_model, num_experts, kind.top_k, capacity=Capacity(kind.factor, **kind.capacity), balance_over=balance_over,
        jitter=0.0, salt=6, **own | kind.own,
    )
    torch.nn.init.normal_(router.weight)
    return router.train()


def make_layer(kind: Kind, num_experts: int = 5) -> MoELayer:
    experts = Experts(num_experts, 8, 16, "swiglu")
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return MoELayer(make_router(kind, num_experts), experts).train()
