"""Routers by which each token chooses the experts with the best scores, independent of other tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moescale.moe.capacity import assign_left_behind
from moescale.moe.losses import load_balance_loss
from moescale.moe.routers.base import Router, normalise
from moescale.ops.device import triton_runs
from moescale.ops.router import top_k
from moescale.ops.token_random import uniform


class MixtralRouter(Router):
    """Chooses the top_k experts; weights are a softmax over the chosen logits alone (Mixtral of Experts, sec. 2.1).

    normalize_weights: False leaves them the probabilities that they have among all experts (Jamba).
    """

    drops_nothing = True

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, normalize_weights: bool, **others: Any) -> None:
        super().__init__(d_model, num_experts, top_k, **others)
        self.normalize_weights = normalize_weights

    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        chosen, expert = top_k(logits, self.top_k)
        return expert, chosen.softmax(-1) if self.normalize_weights else probs.gather(-1, expert)

    def settle(self, logits: Tensor, token_id: Tensor, valid_whole: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not triton_runs(logits):
            return super().settle(logits, token_id, valid_whole)
        from moescale.ops.router_triton import route  # the choice and all sums in one pass

        valid = token_id >= 0
        if self.observers:
            probs = self.probabilities(logits.detach())
            for observe in self.observers:
                observe(probs, valid)
        weight, mass, z, expert, choices = route(logits, valid, self.top_k, self.normalize_weights)
        balance = load_balance_loss(mass, self.scope.total(choices, self.sequence))
        return expert, weight, valid.unsqueeze(-1).expand_as(expert), torch.stack((balance, z.sum()))


class SwitchRouter(Router):
    """Chooses the best expert, within a capacity; the weight is its raw probability (Switch Transformers, eq. 1 to 3).

    left_behind_choices: how many experts a token tries, best first, until one has a slot (appendix B).
    """

    balance_choices = 1

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, left_behind_choices: int, **others: Any
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **others)
        self.num_choices = left_behind_choices

    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        weight, expert = top_k(probs, self.num_choices)
        return expert, weight

    def decide(
        self, logits: Tensor, probs: Tensor, token_id: Tensor, valid_whole: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        expert, weight, kept = super().decide(logits, probs, token_id, valid_whole)
        return expert, weight, kept & (kept.cumsum(-1) == 1)  # without a capacity all are kept: the first is enough

    def assign_slots(self, expert: Tensor, wanted: Tensor, slots: Tensor) -> Tensor:
        return assign_left_behind(expert, wanted, slots)


class GShardRouter(Router):
    """Chooses the best two, the second at random in proportion to its weight; weights are normalised over both.

    GShard, algorithm 1.
    """

    balance_choices = 1

    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        weight, expert = top_k(probs, 2)
        return expert, weight / weight.sum(-1, keepdim=True)

    def wanted(self, weight: Tensor, token_id: Tensor) -> Tensor:
        wanted = super().wanted(weight, token_id)
        if self.training:
            wanted[..., 1] = 2 * weight[..., 1].detach() > uniform(token_id, self.salt + 1)
        return wanted


class SigmoidBiasRouter(Router):
    """Chooses the top_k experts by sigmoid score plus bias; weights are the scores alone (DeepSeek-V3, eq. 12 to 16).

    The experts form groups, in order. A token's experts come from its best `top_k_groups` of them, by the sum of each
    group's best top_k / top_k_groups, rounded down and at least one (its section 2.1.2, node-limited routing).
    expert_bias: [experts] float32; it decides which experts and groups are chosen, and has no gradient. The balance
    loss counts what the scores alone would choose, without groups (eq. 17 to 20).
    """

    drops_nothing = True
    expert_bias: Tensor

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, num_expert_groups: int, top_k_groups: int,
        routed_scaling: float, bias_update_rate: float, **others: Any,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **others)
        self.num_expert_groups, self.top_k_groups = num_expert_groups, top_k_groups
        self.routed_scaling, self.bias_update_rate = routed_scaling, bias_update_rate
        self.register_buffer("expert_bias", torch.zeros(num_experts))

    def probabilities(self, logits: Tensor) -> Tensor:
        return normalise(logits.sigmoid())

    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        biased = scores.detach() + self.expert_bias
        if self.top_k_groups < self.num_expert_groups:
            groups = biased.unflatten(-1, (self.num_expert_groups, -1))
            counted = max(1, self.top_k // self.top_k_groups)
            _, best = top_k(top_k(groups, counted)[0].sum(-1), self.top_k_groups)
            others = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
            biased = groups.masked_fill(others.unsqueeze(-1), float("-inf")).flatten(-2)
        _, expert = top_k(biased, self.top_k)
        return expert, self.routed_scaling * normalise(scores.gather(-1, expert))

    def counted(self, expert: Tensor, probs: Tensor) -> Tensor:
        return top_k(probs, self.top_k)[1]

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """Move the bias of each expert against its load (Wang et al., 2024, algorithm 1).

        load: [experts] int64, assignments of one step's whole global batch.
        """
        above = (load * self.num_experts - load.sum()).sign()  # above the mean, in integers: the same on every rank
        self.expert_bias -= self.bias_update_rate * above


TOKEN_CHOICE: dict[str, type[Router]] = {
    "mixtral": MixtralRouter, "switch": SwitchRouter, "gshard": GShardRouter, "sigmoid_bias": SigmoidBiasRouter,
}
