"""Routers: which experts a token goes to, and how much of each it takes. All in float32.

| router        | experts       | weight                          | balance loss counts | drops               | causal |
|---------------|---------------|---------------------------------|---------------------|---------------------|--------|
| mixtral       | top_k         | softmax over the chosen logits  | all choices         | nothing             | yes    |
| switch        | 1             | raw probability                 | the choice          | over capacity       | yes    |
| gshard        | 2             | normalised over both, then drop | first choices       | over it, or by coin | no     |
| sigmoid_bias  | top_k         | normalised sigmoid scores       | all choices         | nothing             | yes    |
| expert_choice | that chose it | raw probability                 | none needed         | what none chose     | no     |

Capacity and the balance loss are counted per sequence, before dropping. In evaluation nothing is dropped and nothing
is random. sigmoid_bias chooses by score plus a bias, which moves once a step, against the load of the global batch.
Where experts chose in training, tokens choose in evaluation, their top_k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescale.layers.linear import matrix_fill
from moescale.moe.losses import load_balance_loss, router_z_loss
from moescale.moe.routing import Routing, best_tokens, sort_by_expert, within_capacity
from moescale.ops.random import uniform, uniform_features
from moescale.ops.sequence import Sequence


class Router(nn.Module, ABC):
    """What all routers share: logits, losses, capacity, padding. weight: [experts, d_model]"""

    balance_choices: int | None = None  # how many of a token's choices the balance loss counts; None = all

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        capacity_factor: float | None,
        jitter: float,
        salt: int,
        init: str,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.capacity_factor = num_experts, top_k, capacity_factor
        self.jitter, self.salt = jitter, salt
        self.sequence = Sequence()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.initial = {"weight": matrix_fill(init, d_model)}

    def forward(self, x: Tensor, serial: Tensor) -> tuple[Routing, Tensor]:
        """Route the tokens of each group.

        x: [groups, tokens, d_model], the own positions of each sequence, which is a group.
        serial: [groups, seq] int64, of the whole sequences; -1 = padding, which goes nowhere.
        -> Routing of the flattened tokens; [2] float32: load-balance and router z-loss, summed over own valid tokens
        """
        valid_whole, serial = serial >= 0, self.sequence.own(serial)
        valid = serial >= 0
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # a bf16 router diverges (Switch, sec. 2.4)
        if self.training and self.jitter:
            noise = uniform_features(serial, self.salt, x.shape[-1])
            wide = wide * (1 + self.jitter * (2 * noise - 1))
        logits = F.linear(wide, self.weight.to(wide.dtype))  # [groups, tokens, experts]
        probs = self.probabilities(logits)
        expert, weight, kept = self.decide(logits, probs, serial, valid_whole)  # [groups, tokens, choices]
        losses = torch.stack((self.balance_loss(expert, probs, valid), router_z_loss(logits, valid)))
        routing = sort_by_expert(expert.flatten(0, 1), weight.flatten(0, 1), kept.flatten(0, 1), self.num_experts)
        return routing, losses

    def decide(
        self, logits: Tensor, probs: Tensor, serial: Tensor, valid_whole: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose, and drop. logits, probs: [groups, tokens, experts]. serial: [groups, tokens] int64, own positions.

        valid_whole: [groups, seq] bool. -> expert, weight, kept: [groups, tokens, choices]
        """
        expert, weight = self.choose(logits, probs)
        wanted = self.wanted(weight, serial) & (serial >= 0).unsqueeze(-1)
        if self.training and self.capacity_factor is not None:
            wanted = self._within_capacity(expert, wanted, valid_whole)
        return expert, weight, wanted

    def balance_loss(self, expert: Tensor, probs: Tensor, valid: Tensor) -> Tensor:
        """Count over the whole sequences what goes to each expert. -> scalar, summed over own valid tokens"""
        counted = expert[..., : self.balance_choices]
        ones = valid.unsqueeze(-1).expand_as(counted).to(probs.dtype)
        assignments = probs.new_zeros(len(expert), self.num_experts)
        assignments.scatter_add_(1, counted.flatten(1), ones.flatten(1))  # [groups, experts]
        return load_balance_loss(probs, self.sequence.sum(assignments), valid)

    def dropped(self, routing: Routing, valid: Tensor) -> Tensor:
        """Count the choices that have no row. valid: [groups, tokens] bool, own. -> scalar int64"""
        return valid.sum() * routing.row.shape[1] - len(routing.token)

    def _within_capacity(self, expert: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
        """Count slots over the whole sequences, whoever holds their positions. valid: [groups, seq] bool"""
        choice = self.sequence.whole(torch.where(wanted, expert, -1).to(torch.int32)).long()
        kept = within_capacity(choice.clamp(min=0), choice >= 0, self._capacity(valid), self.num_experts)
        return self.sequence.own(kept)

    def _capacity(self, valid: Tensor) -> Tensor:
        """Slots of one expert in each group: its even share times the factor, at least one. -> [groups] int64"""
        assert self.capacity_factor is not None
        share = valid.sum(1).double() * self.top_k / self.num_experts
        return (self.capacity_factor * share).long().clamp(min=1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Say how much of a token each expert would take if it could choose all; they add up to one."""
        return logits.softmax(-1)

    @abstractmethod
    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """logits, probs: [groups, tokens, experts]. -> expert, weight: [groups, tokens, choices], the best first"""

    def wanted(self, weight: Tensor, serial: Tensor) -> Tensor:
        """Say which choices a token wants before capacity is counted. -> [groups, tokens, choices] bool"""
        return torch.ones_like(weight, dtype=torch.bool)


class MixtralRouter(Router):
    """The top_k experts, weighed by a softmax over their logits alone (Mixtral of Experts, sec. 2.1)."""

    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        chosen, expert = top_k(logits, self.top_k)
        return expert, chosen.softmax(-1)


class SwitchRouter(Router):
    """The best expert, weighed by its raw probability, within a capacity (Switch Transformers, eq. 1 to 3)."""

    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        weight, expert = top_k(probs, 1)
        return expert, weight


class GShardRouter(Router):
    """The best two, normalised over both; the second at random in proportion to its weight (GShard, algorithm 1)."""

    balance_choices = 1

    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        weight, expert = top_k(probs, 2)
        return expert, weight / weight.sum(-1, keepdim=True)

    def wanted(self, weight: Tensor, serial: Tensor) -> Tensor:
        wanted = super().wanted(weight, serial)
        if self.training:
            wanted[..., 1] = 2 * weight[..., 1].detach() > uniform(serial, self.salt + 1)
        return wanted


class SigmoidBiasRouter(Router):
    """The top_k experts by sigmoid score plus bias, weighed by the scores alone (DeepSeek-V3, eq. 12 to 16).

    The experts lie in groups, in order. A token's come from its best `top_k_groups` of them, by the sum of each one's
    best two. expert_bias: [experts] float32; it selects, has no gradient, and balances in place of a loss.
    """

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
        return _normalise(logits.sigmoid())

    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        biased = scores.detach() + self.expert_bias
        if self.top_k_groups < self.num_expert_groups:
            groups = biased.unflatten(-1, (self.num_expert_groups, -1))
            _, best = top_k(top_k(groups, 2)[0].sum(-1), self.top_k_groups)
            others = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
            biased = groups.masked_fill(others.unsqueeze(-1), float("-inf")).flatten(-2)
        _, expert = top_k(biased, self.top_k)
        return expert, self.routed_scaling * _normalise(scores.gather(-1, expert))

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """Move the bias of each expert against its load (Wang et al., 2024, algorithm 1).

        load: [experts] int64, assignments of one step's whole global batch.
        """
        above = (load * self.num_experts - load.sum()).sign()  # of the mean, in whole numbers: the same on every rank
        self.expert_bias -= self.bias_update_rate * above


class ExpertChoiceRouter(Router):
    """Each expert takes the tokens of a sequence that give it most probability (Zhou et al., 2022, eq. 1 and 2).

    capacity_factor is how many experts a token has on average; top_k how many it has in evaluation, where an expert
    cannot look at tokens to come. Loads are equal, so that nothing needs balancing.
    """

    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        weight, expert = top_k(probs, self.top_k)
        return expert, weight

    def decide(
        self, logits: Tensor, probs: Tensor, serial: Tensor, valid_whole: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return super().decide(logits, probs, serial, valid_whole)
        # Equal tokens, such as the first of each document, differ by rounding alone, in each layout otherwise. In fewer
        # bits they are equal, and the earlier one comes first. The bits of positive floats sort as the floats do.
        scores = self.sequence.whole(probs.detach().float().contiguous().view(torch.int32) >> 8)
        kept = self.sequence.own(best_tokens(scores, valid_whole, self._capacity(valid_whole)))
        most = int(kept.sum(-1).max()) if len(kept.flatten()) else 0
        order = kept.byte().argsort(dim=-1, descending=True, stable=True)
        expert = order[..., : max(1, most)]  # no more choices than some token has
        return expert, probs.gather(-1, expert), kept.gather(-1, expert)

    def _capacity(self, valid: Tensor) -> Tensor:
        assert self.capacity_factor is not None
        return (self.capacity_factor * valid.sum(1).double() / self.num_experts).long().clamp(min=1)

    def balance_loss(self, expert: Tensor, probs: Tensor, valid: Tensor) -> Tensor:
        return probs.new_zeros(())

    def dropped(self, routing: Routing, valid: Tensor) -> Tensor:
        """Count the tokens that no expert took."""
        return (valid.flatten() & (routing.row < 0).all(1)).sum()


def _normalise(scores: Tensor) -> Tensor:
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)  # all may be zero


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take the k largest along the last dim, the best first, the lower index among equals. -> values, indices"""
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


ROUTERS: dict[str, type[Router]] = {
    "mixtral": MixtralRouter, "switch": SwitchRouter, "gshard": GShardRouter, "sigmoid_bias": SigmoidBiasRouter,
    "expert_choice": ExpertChoiceRouter,
}
