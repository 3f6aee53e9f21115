"""Who competes in the MoE benchmark: each a layer made from the same weights, with its output and gradients.

All route alike: the best top_k experts by a float32 router, weighed by a softmax over their logits. Peers that bring no
router (the einsum form, the loop, transformers' experts) get torch's own topk and softmax. On several ranks each rank
has its share of the experts; peers that have no expert parallelism compete on one rank alone.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from moe_cases import Case, Weights
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moescale.comm.collectives import Group
from moescale.layers.feed_forward import FeedForward
from moescale.moe.dispatchers import Dispatcher
from moescale.moe.experts import Experts
from moescale.moe.hops import Hop
from moescale.moe.layer import MoELayer
from moescale.moe.routers import ROUTERS, Capacity


class Peer(ABC):
    """A layer: [tokens, d_model] -> the same. exact: whether it gives what the reference gives."""

    exact = True
    module: nn.Module

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def weights(self) -> Weights:
        """The gradients of this rank's weights, by the reference's names."""


def gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def own_experts(weights: Weights, group: Group) -> Weights:
    """This rank's router and share of the experts, copied."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    return {name: weight.clone() if name == "router" else weight.chunk(ranks)[rank].clone()
            for name, weight in weights.items()}


class MoEScale(Peer):
    """This project's layer, local or with all-to-all."""

    def __init__(self, case: Case, weights: Weights, group: Group, router: str = "mixtral") -> None:
        choose = ROUTERS[router](
            case.d_model, case.num_experts, case.top_k, capacity=Capacity(CAPACITY.get(router)),
            balance_over="sequence", jitter=0.0, salt=0, **OWN.get(router, {}),
        )
        own = own_experts(weights, group)
        experts = Experts(len(own["up"]), case.d_model, case.d_ff, "swiglu").to(own["up"].dtype)
        choose.weight.data = own["router"]
        experts.load_state_dict({name: own[name] for name in ("gate", "up", "down")})
        self.module = self.layer = MoELayer(choose, experts)
        self.exact = router == "mixtral"
        if dist.get_world_size(group) > 1:
            self.layer.dispatcher = Dispatcher([Hop(group)])

    def forward(self, x: Tensor) -> Tensor:
        token_id = torch.arange(len(x)).unsqueeze(0)
        return self.layer(x.unsqueeze(0), token_id)[0].squeeze(0)

    def weights(self) -> Weights:
        experts = self.layer.experts
        assert experts.gate is not None
        return {"router": gradient(self.layer.router.weight), "gate": gradient(experts.gate),
                "up": gradient(experts.up), "down": gradient(experts.down)}


CAPACITY = {"switch": 1.25, "gshard": 1.25, "expert_choice": 1.25}
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"normalize_weights": True},
    "sigmoid_bias": {"num_expert_groups": 1, "top_k_groups": 1, "routed_scaling": 1.0, "bias_update_rate": 0.001},
    "switch": {"left_behind_choices": 1},
}


class SwiGLU(nn.Module):
    """One expert, in DeepSpeed's hands."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DeepSpeed(Peer):
    """`deepspeed.moe.layer.MoE`, its second expert not drawn at random; with capacity as needed, or its usual one."""

    def __init__(self, case: Case, weights: Weights, group: Group, drops: bool) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
        from deepspeed.moe.layer import MoE

        ranks = dist.get_world_size(group)
        deepspeed.init_distributed("gloo", verbose=False)
        self.module = self.moe = MoE(
            case.d_model, SwiGLU(case.d_model, case.d_ff).to(weights["up"].dtype), case.num_experts, ranks, case.top_k,
            drop_tokens=drops, top2_2nd_expert_sampling=False,
        )
        self.moe.set_deepspeed_parallelism()
        self.exact = not drops
        own = own_experts(weights, group)
        self.router = self.moe.deepspeed_moe.gate.wg.weight
        self.router.data = own["router"]
        self.experts = self.moe.deepspeed_moe.experts.deepspeed_experts
        for index, expert in enumerate(self.experts):
            expert.load_state_dict({f"{name}.weight": own[name][index] for name in ("gate", "up", "down")})

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)[0]

    def weights(self) -> Weights:
        return {"router": gradient(self.router),
                **{name: torch.stack([gradient(getattr(expert, name).weight) for expert in self.experts])
                   for name in ("gate", "up", "down")}}


class Plain(Peer):
    """Those without a router of their own, on one rank."""

    def __init__(self, case: Case, weights: Weights) -> None:
        self.case = case
        self.leaf = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
        self.module = nn.ParameterDict(self.leaf)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts. -> expert, weight: [tokens, top_k]"""
        chosen, expert = F.linear(x.float(), self.leaf["router"]).topk(self.case.top_k)
        return expert, chosen.softmax(-1)

    def weights(self) -> Weights:
        return {name: gradient(parameter) for name, parameter in self.leaf.items()}


class Loop(Plain):
    """Expert by expert in plain torch."""

    def forward(self, x: Tensor) -> Tensor:
        expert, weight = self.route(x)
        y = torch.zeros_like(x)
        for index in range(self.case.num_experts):
            token, choice = torch.where(expert == index)
            rows = x[token]
            gate, up, down = (self.leaf[name][index] for name in ("gate", "up", "down"))
            out = F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            y = y.index_add(0, token, out * weight[token, choice].unsqueeze(1).to(out.dtype))
        return y


class Einsum(Plain):
    """GShard's algorithm 2: a one-hot mask [tokens, experts, capacity], with a capacity at which nothing drops."""

    def forward(self, x: Tensor) -> Tensor:
        expert, weight = self.route(x)
        wanted = F.one_hot(expert, self.case.num_experts)  # [tokens, top_k, experts]
        ahead = wanted.sum(1).cumsum(0).sub_(wanted.sum(1))  # [tokens, experts], slots that earlier tokens took
        capacity = int(wanted.sum((0, 1)).max())
        slot = F.one_hot(ahead.gather(1, expert), capacity).to(weight.dtype)  # [tokens, top_k, capacity]
        combine = torch.einsum("ske,skc->sec", wanted * weight.unsqueeze(-1), slot)
        dispatch = combine.bool().to(x.dtype)
        rows = torch.einsum("sec,sm->ecm", dispatch, x)
        gate, up = (torch.einsum("ecm,ehm->ech", rows, self.leaf[name]) for name in ("gate", "up"))
        out = torch.einsum("ech,emh->ecm", F.silu(gate) * up, self.leaf["down"])
        return torch.einsum("sec,ecm->sm", combine.to(x.dtype), out)


class Transformers(Plain):
    """The experts of transformers' Mixtral, `eager` (its loop) or `grouped_mm`, as they are or under torch.compile."""

    def __init__(self, case: Case, weights: Weights, implementation: str, compiled: bool) -> None:
        self.case = case
        config = MixtralConfig(
            hidden_size=case.d_model, intermediate_size=case.d_ff, num_local_experts=case.num_experts
        )
        config._experts_implementation = implementation
        self.module = self.experts = MixtralExperts(config)
        self.experts.gate_up_proj = nn.Parameter(torch.cat((weights["gate"], weights["up"]), 1))
        self.experts.down_proj = nn.Parameter(weights["down"].clone())
        self.leaf = {"router": nn.Parameter(weights["router"].clone())}
        self.experts.register_parameter("router", self.leaf["router"])
        if compiled:
            self.experts.compile()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.route(x))

    def weights(self) -> Weights:
        gate, up = gradient(self.experts.gate_up_proj).chunk(2, 1)
        return {"router": gradient(self.leaf["router"]), "gate": gate, "up": up,
                "down": gradient(self.experts.down_proj)}


class Dense(Peer):
    """The limit: a dense layer in which each token costs as many multiplications; no router, other weights."""

    exact = False

    def __init__(self, case: Case, weights: Weights) -> None:
        self.module = FeedForward(case.d_model, case.top_k * case.d_ff, "swiglu").to(weights["up"].dtype)
        for parameter in self.module.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, x)[0]

    def weights(self) -> Weights:
        return {}


def make_peer(name: str, case: Case, weights: Weights, group: Group) -> Peer:
    kind, _, detail = name.partition(", ")
    if kind == "moescale":
        return MoEScale(case, weights, group, detail or "mixtral")
    if kind == "deepspeed":
        return DeepSpeed(case, weights, group, drops=detail == "drops")
    if kind == "transformers":
        implementation, _, compiled = detail.partition(", ")
        return Transformers(case, weights, implementation, compiled=compiled == "compiled")
    plain: dict[str, Callable[[Case, Weights], Peer]] = {"einsum": Einsum, "loop": Loop, "dense": Dense}
    return plain[kind](case, weights)


PEERS = ("moescale", "dense", "deepspeed", "deepspeed, drops", "einsum", "loop", "transformers, eager",
         "transformers, grouped_mm", "transformers, eager, compiled", "transformers, grouped_mm, compiled")
ON_RANKS = ("moescale", "dense", "deepspeed", "deepspeed, drops")
