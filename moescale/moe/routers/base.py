"""What all routers share: logits, losses, capacity, padding. All in float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescale.comm.sequence_shards import Sequence
from moescale.layers.linear import matrix_fill
from moescale.moe.balance_scopes import SCOPES
from moescale.moe.capacity import coarse, in_order, within_capacity
from moescale.moe.losses import load_balance_loss, router_z_loss
from moescale.moe.routing import Routing, num_valid, sort_by_expert
from moescale.ops.token_random import uniform_features


@dataclass(frozen=True)
class Capacity:
    """How many slots an expert has in each group, and who gets them.

    factor: slots over the even share, in training; None = dropless. eval_factor: the same in evaluation.
    least: slots that there are in any case. by_probability: tokens of which some expert is surer come first, instead of
    earlier ones.
    """

    factor: float | None = None
    eval_factor: float | None = None
    least: int = 1
    by_probability: bool = False


class Router(nn.Module, ABC):
    """Choose experts for tokens. weight: [experts, d_model]"""

    drops_nothing = False  # whatever the capacity
    balance_choices: int | None = None  # how many of a token's choices the balance loss counts; None = all

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, capacity: Capacity, balance_over: str, jitter: float,
        salt: int, init: str,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.capacity = num_experts, top_k, capacity
        self.jitter, self.salt = jitter, salt
        self.num_choices = top_k  # that `choose` gives, of which a token may get fewer
        self.dropless = False  # True while decoding
        self.look: Callable[[Tensor, Tensor], None] | None = None  # sees the probabilities
        self.sequence = Sequence()
        self.scope = SCOPES[balance_over]()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.initial = {"weight": matrix_fill(init, d_model)}

    def forward(self, x: Tensor, token_id: Tensor) -> tuple[Routing, Tensor]:
        """Route the tokens of each group.

        x: [groups, tokens, d_model], the own positions of each sequence, which is a group.
        token_id: [groups, seq] int64, of the whole sequences; -1 = padding, which goes nowhere.
        -> Routing of the flattened tokens; [2] float32: load-balance and router z-loss, summed over own valid tokens
        """
        valid_whole, token_id = token_id >= 0, self.sequence.own(token_id)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # a bf16 router diverges (Switch, sec. 2.4)
        if self.training and self.jitter:
            noise = uniform_features(token_id, self.salt, x.shape[-1])
            wide = wide * (1 + self.jitter * (2 * noise - 1))
        logits = F.linear(wide, self.weight.to(wide.dtype))  # [groups, tokens, experts]
        expert, weight, kept, losses = self.settle(logits, token_id, valid_whole)
        num_kept = num_valid(token_id) * self.top_k if self.drops_nothing else None
        routing = sort_by_expert(
            expert.flatten(0, 1), weight.flatten(0, 1), kept.flatten(0, 1), self.num_experts, num_kept
        )
        return routing, losses

    def settle(self, logits: Tensor, token_id: Tensor, valid_whole: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose, drop, and add up the losses; arguments as of `decide`.

        -> expert, weight, kept: [groups, tokens, choices]; [2] losses, as of `forward`
        """
        probs, valid = self.probabilities(logits), token_id >= 0
        if self.look is not None:
            self.look(probs, valid)
        expert, weight, kept = self.decide(logits, probs, token_id, valid_whole)
        losses = torch.stack((self.balance_loss(expert, probs, valid), router_z_loss(logits, valid)))
        return expert, weight, kept, losses

    def decide(
        self, logits: Tensor, probs: Tensor, token_id: Tensor, valid_whole: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose, and drop. logits, probs: [groups, tokens, experts]. token_id: [groups, tokens] int64, own positions.

        valid_whole: [groups, seq] bool. -> expert, weight, kept: [groups, tokens, choices]
        """
        expert, weight = self.choose(logits, probs)
        wanted = self.wanted(weight, token_id) & (token_id >= 0).unsqueeze(-1)
        factor = self.capacity.factor if self.training else self.capacity.eval_factor
        if factor is not None and not self.dropless:
            slots = self.slots(valid_whole, factor)
            wanted = self._within_capacity(expert, wanted, probs, slots)
        return expert, weight, wanted

    def balance_loss(self, expert: Tensor, probs: Tensor, valid: Tensor) -> Tensor:
        """Count what own tokens chose, and hold it to the scope. -> scalar, summed over own valid tokens"""
        counted = self.counted(expert, probs)
        choices = expert.new_zeros(len(expert), self.num_experts)
        choices.scatter_add_(1, counted.flatten(1), valid.unsqueeze(-1).expand_as(counted).flatten(1).long())
        mass = (probs * valid.unsqueeze(-1).to(probs.dtype)).sum(1)
        return load_balance_loss(mass, self.scope.total(choices, self.sequence))

    def counted(self, expert: Tensor, probs: Tensor) -> Tensor:
        """Say which choices the balance loss counts. -> [groups, tokens, any number] int64"""
        return expert[..., : self.balance_choices]

    def dropped(self, routing: Routing, valid: Tensor) -> Tensor:
        """Count the choices that have no row. valid: [groups, tokens] bool, own. -> scalar int64"""
        return valid.sum() * self.top_k - len(routing.token)

    def wanted_rows(self, tokens: Tensor) -> Tensor:
        """Count that of which `dropped` is a part. tokens: scalar int64, valid ones. -> scalar int64"""
        return tokens * self.top_k

    def room(self, valid_whole: Tensor) -> Tensor:
        """Count all experts' slots in training, of sequences on several ranks a part by own tokens; 0 without capacity.

        valid_whole: [groups, seq] bool. -> scalar float64
        """
        if self.capacity.factor is None:
            return valid_whole.new_zeros((), dtype=torch.float64)
        tokens, own = valid_whole.sum(1), self.sequence.own(valid_whole).sum(1)
        slots = self.slots(valid_whole, self.capacity.factor).double() * self.num_experts
        return (slots * own / tokens.clamp(min=1)).sum()

    def slots(self, valid: Tensor, factor: float) -> Tensor:
        """Give one expert its even share of each group's assignments times the factor. -> [groups] int64"""
        share = valid.sum(1).double() * self.top_k / self.num_experts
        return (factor * share).long().clamp(min=self.capacity.least)

    def _within_capacity(self, expert: Tensor, wanted: Tensor, probs: Tensor, slots: Tensor) -> Tensor:
        """Count slots over the whole sequences, whoever holds their positions. slots: [groups] int64"""
        choice = torch.where(wanted, expert, -1).to(torch.int32)
        room = slots.unsqueeze(1).expand(-1, self.num_experts)
        if not self.capacity.by_probability:
            choice = self.sequence.whole(choice).long()
            return self.sequence.own(self.place(choice.clamp(min=0), choice >= 0, room))
        both = self.sequence.whole(torch.cat((choice, coarse(probs.amax(-1, keepdim=True))), -1))
        order = in_order(both[..., -1]).unsqueeze(-1).expand_as(both[..., :-1])
        choice = both[..., :-1].long().gather(1, order)  # the surest token first (Riquelme et al., 2021, sec. 4)
        kept = self.place(choice.clamp(min=0), choice >= 0, room)
        return self.sequence.own(torch.empty_like(kept).scatter_(1, order, kept))

    def place(self, expert: Tensor, wanted: Tensor, room: Tensor) -> Tensor:
        """Give out the slots, tokens in their order. expert, wanted: [groups, seq, choices]. -> like wanted

        room: [groups, experts] int64.
        """
        return within_capacity(expert, wanted, room)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Say how much of a token each expert would take if it could choose all; they add up to one."""
        return logits.softmax(-1)

    @abstractmethod
    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """logits, probs: [groups, tokens, experts]. -> expert, weight: [groups, tokens, choices], the best first"""

    def wanted(self, weight: Tensor, token_id: Tensor) -> Tensor:
        """Say which choices a token wants before capacity is counted. -> [groups, tokens, choices] bool"""
        return torch.ones_like(weight, dtype=torch.bool)


def normalise(scores: Tensor) -> Tensor:
    """Make scores add up to one along the last dim."""
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)  # all may be zero


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take the k largest along the last dim, the best first, the lower index among equals. -> values, indices"""
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]
