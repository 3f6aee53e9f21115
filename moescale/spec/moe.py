"""Mixtures of experts: their keys, and the weights of one."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator

from moescale.errors import ConfigError, any_of, check_width, divisors, refuse
from moescale.spec.feed_forward import Activation, feed_forward_weights
from moescale.spec.group import Group
from moescale.spec.small import Small, smallest_divisor, smallest_multiple
from moescale.spec.weights import Init, Weight, below, initial

OWN_KEYS: dict[str, tuple[str, ...]] = {  # a router: its arguments that no other router has
    "mixtral": ("normalize_weights",),
    "sigmoid_bias": ("num_expert_groups", "top_k_groups", "routed_scaling", "bias_update_rate"),
    "switch": ("left_behind_choices",),
}
WITH_CAPACITY = ("switch", "gshard", "sinkhorn")
MEANS_NOTHING_ELSEWHERE = {  # a key of MoEConfig: the routers that it means something to
    **{key: (router,) for router, keys in OWN_KEYS.items() for key in keys},
    "drop_by": WITH_CAPACITY, "eval_capacity_factor": WITH_CAPACITY, "min_capacity": (*WITH_CAPACITY, "expert_choice"),
    "balance_over": ("mixtral", "sigmoid_bias", *WITH_CAPACITY),
}
MAY_DIFFER = ("d_ff", "activation", "num_shared_experts", "expert_dropout", "jitter")  # by layer; the rest is counted
CAPACITY_KEYS = ("eval_capacity_factor", "min_capacity", "drop_by", "left_behind_choices")


class MoEConfig(Group):
    num_experts: int = Field(8, ge=1, le=100_000)
    """Experts of a mixture, among which the router chooses."""
    top_k: int = Field(2, ge=1)
    """Experts that a token gets."""
    num_shared_experts: int = Field(0, ge=0)
    """Experts next to those, which all tokens use."""
    router: Literal["mixtral", "switch", "gshard", "sigmoid_bias", "expert_choice", "sinkhorn"] = "mixtral"
    """How tokens find experts; moe/routers/__init__.py says how each weighs, balances and drops."""
    capacity_factor: float | None = Field(None, gt=0)
    """Slots of an expert in each sequence, over its even share; null drops nothing."""
    eval_capacity_factor: float | None = Field(None, gt=0)
    """The same in evaluation; null drops nothing there; generating text never drops."""
    min_capacity: int = Field(1, ge=1)
    """Slots that an expert has in any case, in each sequence."""
    drop_by: Literal["position", "probability"] = "position"
    """Who finds no slot: later tokens, or those of which the router is less sure."""
    left_behind_choices: int = Field(1, ge=1)
    """With `switch`: experts that a token tries, best first, until one has a slot left."""
    d_ff: int = Field(512, ge=8)
    """Hidden features of one expert."""
    activation: Activation = "swiglu"
    """The nonlinearity of an expert; swiglu and geglu have a gate."""
    jitter: float = Field(0.0, ge=0, lt=1)
    """The router's input is multiplied by a random number in 1 +- this while training (Switch)."""
    expert_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the hidden features in experts that is dropped while training (Switch's fine-tuning)."""
    load_balance_coefficient: float = Field(0.01, ge=0)
    """Weight of the load balance loss, which keeps experts equally busy."""
    balance_over: Literal["sequence", "micro_batch", "global_batch"] = "sequence"
    """Tokens over which the balance loss takes its means: those of a sequence, a pass or a whole step."""
    router_z_coefficient: float = Field(0.0, ge=0)
    """Weight of the router z-loss, which keeps the router's logits small (ST-MoE: 1e-3)."""
    normalize_weights: bool = True
    """With `mixtral`: weights of a token's experts add up to 1; false leaves their shares among all experts (Jamba)."""
    num_expert_groups: int = Field(1, ge=1)
    """With `sigmoid_bias`: groups that the experts lie in."""
    top_k_groups: int = Field(1, ge=1)
    """With `sigmoid_bias`: groups that a token's experts come from, by the sum of their best top_k / top_k_groups."""
    routed_scaling: float = Field(1.0, gt=0)
    """With `sigmoid_bias`: what the weights of a token's experts add up to."""
    bias_update_rate: float = Field(0.001, ge=0)
    """With `sigmoid_bias`: how far the bias of each expert moves in a step."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self.top_k > self.num_experts,
                f"moe.top_k={self.top_k} must be at most moe.num_experts={self.num_experts}")
        refuse(self.router == "switch" and self.top_k != 1,
                f"moe.router=switch sends each token to one expert: write moe.top_k=1 instead of {self.top_k}")
        refuse(self.router == "gshard" and self.top_k != 2,
                f"moe.router=gshard sends each token to two experts: write moe.top_k=2 instead of {self.top_k}")
        refuse(self.router in ("mixtral", "sigmoid_bias") and self.capacity_factor is not None,
                f"moe.router={self.router} drops nothing: write moe.capacity_factor=null, or moe.router="
                f"{any_of(WITH_CAPACITY)}")
        one = self.normalizes and self.top_k == 1 < self.num_experts
        refuse(one and self.load_balance_coefficient == 0 and self.router_z_coefficient == 0,
                f"moe.router={self.router} gives the one expert of moe.top_k=1 the weight 1, so that no loss trains "
                "the router: write e.g. moe.load_balance_coefficient=0.01, or moe.router=switch")
        self._check_keys()
        self._check_capacity()
        self._check_groups()
        self._check_expert_choice()
        check_width("moe.d_ff", self.d_ff)
        return self

    @property
    def normalizes(self) -> bool:
        """Whether the weights of a token's experts add up to the same for all tokens, so that one has no say."""
        return self.router == "sigmoid_bias" or (self.router == "mixtral" and self.normalize_weights)

    def _check_keys(self) -> None:
        """Refuse what means nothing to the router, or to a router without capacity."""
        for key, routers in MEANS_NOTHING_ELSEWHERE.items():
            value, default = getattr(self, key), type(self).model_fields[key].default
            written = "null" if default is None else default
            refuse(self.router not in routers and value != default,
                    f"moe.{key}={value} means nothing to moe.router={self.router}: write moe.{key}={written}, "
                    f"or moe.router={any_of(routers)}")
            refuse(key in CAPACITY_KEYS and self.capacity_factor is None and value != default,
                    f"moe.{key}={value} means nothing without a capacity: write moe.{key}={written}, "
                    "or e.g. moe.capacity_factor=1.25")

    def _check_capacity(self) -> None:
        refuse(self.left_behind_choices > self.num_experts,
                f"moe.left_behind_choices={self.left_behind_choices} must be at most "
                f"moe.num_experts={self.num_experts}")

    def _check_expert_choice(self) -> None:
        if self.router != "expert_choice":
            return
        if self.capacity_factor is None:
            raise ConfigError("moe.router=expert_choice needs the number of experts that a token has on average: write "
                              f"e.g. moe.capacity_factor={float(self.top_k)}")
        nearest = max(1, round(self.capacity_factor))
        refuse(self.top_k != nearest,
                f"moe.router=expert_choice with moe.capacity_factor={self.capacity_factor} gives a token about "
                f"{nearest} experts in evaluation: write moe.top_k={nearest} instead of {self.top_k}")

    def _check_groups(self) -> None:
        groups, chosen = self.num_expert_groups, self.top_k_groups
        refuse(self.num_experts % groups != 0,
                f"moe.num_expert_groups={groups} must divide moe.num_experts={self.num_experts}: "
                f"use {divisors(self.num_experts)}")
        refuse(chosen > groups, f"moe.top_k_groups={chosen} must be at most moe.num_expert_groups={groups}")
        size = self.num_experts // groups
        refuse(self.top_k > chosen * size,
                f"moe.top_k={self.top_k} is more than the {chosen * size} experts of moe.top_k_groups={chosen} of "
                f"moe.num_expert_groups={groups}: write moe.top_k_groups={-(-self.top_k // size)}")

    def weights(self, d_model: int, init: str) -> tuple[Weight, ...]:
        """Describe the router, the experts, and the feed-forward that stands for all shared experts."""
        router = Weight(("router", "weight"), (self.num_experts, d_model), ("experts", "d_model"), None, "shared",
                        initial(init, d_model))
        weights = [router]
        if self.router == "sigmoid_bias":
            weights.append(Weight(("router", "expert_bias"), (self.num_experts,), ("experts",), None, "shared",
                                  Init("zeros"), decays=False, learns=False))
        for weight in feed_forward_weights(d_model, self.d_ff, self.activation, init, "sparse"):
            weights.append(replace(weight, name=("experts", weight.name[0]), dims=("experts", *weight.dims),
                                   shape=(self.num_experts, *weight.shape)))
        if self.num_shared_experts:
            d_ff = self.num_shared_experts * self.d_ff
            weights += below("shared", feed_forward_weights(d_model, d_ff, self.activation, init, "shared"))
        return tuple(weights)

    def flops_per_token(self, d_model: int, context: int) -> int:
        """Count the forward pass of one token: the router, and the experts that it meets."""
        expert = sum(weight.size for weight in feed_forward_weights(d_model, self.d_ff, self.activation, "normal"))
        return 2 * (self.num_experts * d_model + (self.top_k + self.num_shared_experts) * expert)

    def state_bytes(self, d_model: int, batch: int, length: int, itemsize: int) -> int:
        """Count what generation keeps: nothing, since no token asks for another."""
        return 0

    def shrink(self, small: Small) -> Self:
        """Make sizes small: experts stay more than top_k, and groups of them groups."""
        enough = min(self.num_experts, max(
            2 * self.top_k + 2, -(-self.top_k // self.top_k_groups) * self.num_expert_groups,
            self.left_behind_choices + 1))
        experts = smallest_divisor(self.num_experts, enough, lambda n: all(
            n % group == 0 for group in (self.num_expert_groups, *small.eps)))
        return self.model_copy(update={
            "num_experts": experts, "min_capacity": min(self.min_capacity, 2),  # below what the factor gives, mostly
            "d_ff": smallest_multiple(16, (8, *small.etps))})
