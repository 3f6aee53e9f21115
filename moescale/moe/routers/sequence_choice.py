"""Routers that need a whole sequence before any of its tokens has an expert: balanced, and not causal.

In evaluation, where later tokens are not known yet, each token chooses for itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moescale.moe.capacity import best_tokens, coarse
from moescale.moe.routers.base import Router
from moescale.moe.routing import Routing
from moescale.ops.router import top_k

SINKHORN_ROUNDS = 20
SINKHORN_STEPS = 2**12  # steps per unit to which logarithms of shares are rounded for the choice


class ExpertChoiceRouter(Router):
    """Lets each expert take the tokens of a sequence that give it most probability (Zhou et al., 2022, eq. 1 and 2).

    The capacity factor is the average number of experts per token; top_k is their number in evaluation, where an expert
    cannot know later tokens. Loads are equal, so that nothing needs balancing.
    """

    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        weight, expert = top_k(probs, self.top_k)
        return expert, weight

    def decide(
        self, logits: Tensor, probs: Tensor, token_id: Tensor, valid_whole: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return super().decide(logits, probs, token_id, valid_whole)
        assert self.capacity.factor is not None
        scores = self.sequence.whole(coarse(probs))
        kept = self.sequence.own(best_tokens(scores, valid_whole, self.slots(valid_whole, self.capacity.factor)))
        most = int(kept.sum(-1).max()) if len(kept.flatten()) else 0
        order = kept.byte().argsort(dim=-1, descending=True, stable=True)
        expert = order[..., : max(1, most)]  # no more choices than some token has
        return expert, probs.gather(-1, expert), kept.gather(-1, expert)

    def slots(self, valid: Tensor, factor: float) -> Tensor:
        share = valid.sum(1).double() / self.num_experts
        return (factor * share).long().clamp(min=self.capacity.least)

    def balance_loss(self, expert: Tensor, probs: Tensor, valid: Tensor) -> Tensor:
        return probs.new_zeros(())

    def dropped(self, routing: Routing, valid: Tensor) -> Tensor:
        """Count the tokens that no expert took."""
        return (valid.flatten() & (routing.row < 0).all(1)).sum()

    def wanted_rows(self, tokens: Tensor) -> Tensor:
        return tokens


class SinkhornRouter(Router):
    """Chooses the top_k experts by scores that Sinkhorn's rounds balance over the sequence; weights are probabilities.

    The balanced assignment of BASE layers (Lewis et al., 2021), with the choice by a transport plan in place of an
    auction (Clark et al., 2022). The choice has no gradient; the weight has. Where the plan has no preference, as with
    one token or with equal ones, the token's own counts.
    """

    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Choose by logits, which in training are balanced; they are rounded, so that ties do not depend on errors.

        logits, probs: [groups, tokens, experts]. -> expert, weight: [groups, tokens, top_k]
        """
        _, by_probability = top_k(probs, self.num_experts)
        _, best = top_k((logits * SINKHORN_STEPS).round().gather(-1, by_probability), self.top_k)
        expert = by_probability.gather(-1, best)
        return expert, probs.gather(-1, expert)

    def decide(
        self, logits: Tensor, probs: Tensor, token_id: Tensor, valid_whole: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:  # each rank computes all of the sequence: the sums over it come out alike
            logits = self.sequence.own(balanced_plan(self.sequence.whole(logits.detach()), valid_whole))
        return super().decide(logits, probs, token_id, valid_whole)


def balanced_plan(logits: Tensor, valid: Tensor) -> Tensor:
    """Share tokens among experts so that all experts get about the same sum, and each token's shares add up to one.

    logits: [groups, tokens, experts]. valid: [groups, tokens] bool. -> logarithms of the shares, float64, like logits
    """
    plan = logits.double().log_softmax(-1)
    padding = torch.where(valid.unsqueeze(-1), 0.0, -math.inf)  # adds nothing to any sum
    for _ in range(SINKHORN_ROUNDS):
        load = (plan + padding).logsumexp(1, keepdim=True)
        even = load.logsumexp(-1, keepdim=True) - math.log(logits.shape[-1])
        plan = (plan + (even - load).nan_to_num(0.0)).log_softmax(-1)  # nan: no token at all
    return plan


SEQUENCE_CHOICE: dict[str, type[Router]] = {"expert_choice": ExpertChoiceRouter, "sinkhorn": SinkhornRouter}
