"""The base of all routers: logits, losses, capacity and padding, computed in float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescale.comm.placement import Placement
from moescale.comm.sequence_shards import SequenceShards
from moescale.layers.exact import Exact
from moescale.moe.balance_scopes import SCOPES
from moescale.moe.capacity import best_first, coarse, within_capacity
from moescale.moe.losses import load_balance_loss, router_z_loss
from moescale.moe.routing import Routing, num_valid, sort_by_expert
from moescale.ops.router import top_k as top_k  # also for those who may not look into ops
from moescale.ops.token_random import uniform_features


@dataclass(frozen=True)
class Capacity:
    """How many slots an expert has in each group, and which tokens get them.

    factor: slots over the even share, in training; None = dropless. eval_factor: the same in evaluation.
    least: the fewest slots. by_probability: tokens with the larger best probability come first, not earlier tokens.
    """

    factor: float | None = None
    eval_factor: float | None = None
    least: int = 1
    by_probability: bool = False


Observer = Callable[[Tensor, Tensor], None]
"""Sees the probabilities [groups, tokens, experts] of own tokens, and which of them are valid, [groups, tokens]."""


class Router(Exact, ABC):
    """Chooses experts for tokens. weight: [experts, d_model]"""

    drops_nothing = False  # whatever the capacity
    balance_choices: int | None = None  # how many of a token's choices the balance loss counts; None = all

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, capacity: Capacity, balance_over: str, jitter: float,
        salt: int,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.capacity = num_experts, top_k, capacity
        self.jitter, self.salt = jitter, salt
        self.num_choices = top_k  # choices that `choose` returns; a token may keep fewer
        self.dropless = False  # True while decoding
        self.observers: list[Observer] = []
        self.score_observers: list[Callable[[Tensor], None]] = []
        self.sequence = SequenceShards()
        self.scope = SCOPES[balance_over]()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))

    def attach(self, placement: Placement) -> None:
        self.sequence = placement.sequence

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Show the probabilities of each pass to the observer. Returns what ends this."""
        self.observers.append(observer)
        return partial(self.observers.remove, observer)

    def observe_scores(self, observer: Callable[[Tensor], None]) -> Callable[[], None]:
        """Show what tokens choose by: logits, which some routers balance, [groups, tokens, experts]."""
        self.score_observers.append(observer)
        return partial(self.score_observers.remove, observer)

    def set_dropless(self, on: bool) -> None:
        """Drop nothing from here on, as in decoding, or heed the capacity."""
        self.dropless = on

    def forward(self, x: Tensor, token_id: Tensor) -> tuple[Routing, Tensor]:
        """Route the tokens of each group.

        x: [groups, tokens, d_model], this rank's positions of each sequence; a sequence is a group.
        token_id: [groups, seq] int64, of the whole sequences; -1 = padding, which goes nowhere.
        -> Routing of the flattened tokens; [2] float32: load-balance and router z-loss, summed over own valid tokens
        """
        whole, token_id = token_id, self.sequence.own(token_id)
        valid_whole = whole >= 0
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # a bf16 router diverges (Switch, sec. 2.4)
        if self.training and self.jitter:
            noise = uniform_features(token_id, self.salt, x.shape[-1])
            x = x * (1 + self.jitter * (2 * noise - 1))
        logits = F.linear(x, self.weight.to(x.dtype))  # [groups, tokens, experts]
        expert, weight, kept, losses = self.settle(logits, token_id, valid_whole)
        num_kept = num_valid(whole, token_id) * self.top_k if self.drops_nothing else None
        routing = sort_by_expert(
            expert.flatten(0, 1), weight.flatten(0, 1), kept.flatten(0, 1), self.num_experts, num_kept
        )
        return routing, losses

    def settle(self, logits: Tensor, token_id: Tensor, valid_whole: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose, drop, and sum the losses. Arguments: as in `decide`.

        -> expert, weight, kept: [groups, tokens, choices]; [2] losses, as in `forward`
        """
        probs, valid = self.probabilities(logits), token_id >= 0
        for observe in self.observers:
            observe(probs, valid)
        expert, weight, kept = self.decide(logits, probs, token_id, valid_whole)
        if self.dropless:  # nobody reads them
            return expert, weight, kept, logits.new_zeros(2)
        losses = torch.stack((self.balance_loss(expert, probs, valid), router_z_loss(logits, valid)))
        return expert, weight, kept, losses

    def decide(
        self, logits: Tensor, probs: Tensor, token_id: Tensor, valid_whole: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts, and drop what has no slot.

        logits, probs: [groups, tokens, experts]. token_id: [groups, tokens] int64, of this rank's positions.
        valid_whole: [groups, seq] bool, of the whole sequences. -> expert, weight, kept: [groups, tokens, choices]
        """
        for observe in self.score_observers:
            observe(logits)
        expert, weight = self.choose(logits, probs)
        wanted = self.wanted(weight, token_id) & (token_id >= 0).unsqueeze(-1)
        factor = self.capacity.factor if self.training else self.capacity.eval_factor
        if factor is not None and not self.dropless:
            slots = self.slots(valid_whole, factor)
            wanted = self._within_capacity(expert, wanted, probs, slots)
        return expert, weight, wanted

    def balance_loss(self, expert: Tensor, probs: Tensor, valid: Tensor) -> Tensor:
        """Compute the balance loss of this rank's tokens, with the shares of the whole scope.

        expert: [groups, tokens, choices]. probs: [groups, tokens, experts]. valid: [groups, tokens] bool.
        -> scalar, summed over this rank's valid tokens
        """
        counted = self.counted(expert, probs)
        choices = expert.new_zeros(len(expert), self.num_experts)
        choices.scatter_add_(1, counted.flatten(1), valid.unsqueeze(-1).expand_as(counted).flatten(1).long())
        mass = (probs * valid.unsqueeze(-1).to(probs.dtype)).sum(1)
        return load_balance_loss(mass, self.scope.total(choices, self.sequence))

    def counted(self, expert: Tensor, probs: Tensor) -> Tensor:
        """Select the choices that the balance loss counts; arguments as in `balance_loss`.

        -> [groups, tokens, any number] int64
        """
        return expert[..., : self.balance_choices]

    def dropped(self, routing: Routing, valid: Tensor) -> Tensor:
        """Count this rank's choices that have no row. valid: [groups, tokens] bool. -> scalar int64"""
        return valid.sum() * self.top_k - len(routing.token)

    def wanted_rows(self, tokens: Tensor) -> Tensor:
        """Count the choices of which `dropped` is a part. tokens: scalar int64, valid ones. -> scalar int64"""
        return tokens * self.top_k

    def total_slots(self, valid_whole: Tensor) -> Tensor:
        """Count the slots of all experts in training; zero without a capacity.

        Of sequences on several ranks, each rank counts a part, in proportion to its tokens.
        valid_whole: [groups, seq] bool. -> scalar float64
        """
        if self.capacity.factor is None:
            return valid_whole.new_zeros((), dtype=torch.float64)
        tokens, own = valid_whole.sum(1), self.sequence.own(valid_whole).sum(1)
        slots = self.slots(valid_whole, self.capacity.factor).double() * self.num_experts
        return (slots * own / tokens.clamp(min=1)).sum()

    def slots(self, valid: Tensor, factor: float) -> Tensor:
        """Count the slots of one expert: its even share of each group's assignments times the factor.

        valid: [groups, seq] bool. -> [groups] int64
        """
        share = valid.sum(1).double() * self.top_k / self.num_experts
        return (factor * share).long().clamp(min=self.capacity.least)

    def _within_capacity(self, expert: Tensor, wanted: Tensor, probs: Tensor, slots: Tensor) -> Tensor:
        """Assign slots over the whole sequences, whichever ranks hold their positions.

        expert, wanted: [groups, tokens, choices]. probs: [groups, tokens, experts]. slots: [groups] int64.
        -> kept, like wanted
        """
        choice = torch.where(wanted, expert, -1).to(torch.int32)
        slots = slots.unsqueeze(1).expand(-1, self.num_experts)
        if not self.capacity.by_probability:
            choice = self.sequence.whole(choice).long()
            return self.sequence.own(self.assign_slots(choice.clamp(min=0), choice >= 0, slots))
        # The surest token first (Riquelme et al., 2021, sec. 4). Choices and scores are gathered together.
        score = coarse(probs.amax(-1, keepdim=True))
        gathered = self.sequence.whole(torch.cat((choice, score), -1))
        choice, score = gathered[..., :-1].long(), gathered[..., -1]
        order = best_first(score).unsqueeze(-1).expand_as(choice)
        choice = choice.gather(1, order)
        kept = self.assign_slots(choice.clamp(min=0), choice >= 0, slots)
        return self.sequence.own(torch.empty_like(kept).scatter_(1, order, kept))

    def assign_slots(self, expert: Tensor, wanted: Tensor, slots: Tensor) -> Tensor:
        """Assign slots to tokens in their order.

        expert, wanted: [groups, seq, choices] int64 and bool. slots: [groups, experts] int64. -> kept, like wanted
        """
        return within_capacity(expert, wanted, slots)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits into probabilities, which add up to one per token. [groups, tokens, experts] -> the same"""
        return logits.softmax(-1)

    @abstractmethod
    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for each token, the best first.

        logits, probs: [groups, tokens, experts]. -> expert, weight: [groups, tokens, choices]
        """

    def wanted(self, weight: Tensor, token_id: Tensor) -> Tensor:
        """Select the choices that ask for a slot. weight: [groups, tokens, choices]. -> bool, like weight"""
        return torch.ones_like(weight, dtype=torch.bool)


def normalise(scores: Tensor) -> Tensor:
    """Scale scores so that they add up to one along the last dim. scores: [..., n], not negative. -> like scores"""
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)  # all may be zero
