"""Routers that look at a whole sequence before any of its tokens has an expert: balanced, and not causal.

In evaluation, where there are no tokens to come, each token chooses for itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moescale.moe.capacity import best_tokens, coarse
from moescale.moe.routers.base import Router, top_k
from moescale.moe.routing import Routing

SINKHORN_ROUNDS = 20


class ExpertChoiceRouter(Router):
    """Each expert takes the tokens of a sequence that give it most probability (Zhou et al., 2022, eq. 1 and 2).

    The capacity factor is how many experts a token has on average; top_k how many it has in evaluation, where an expert
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


class SinkhornRouter(Router):
    """The top_k experts by scores that Sinkhorn's rounds have balanced over the sequence, weighed by raw probability.

    The balanced assignment of BASE layers (Lewis et al., 2021), with the choice by a transport plan in place of an
    auction (Clark et al., 2022, sec. 3.1 and appendix B.2.1). The choice has no gradient; the weight has.
    """

    def choose(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        _, expert = top_k(logits, self.top_k)
        return expert, probs.gather(-1, expert)

    def decide(
        self, logits: Tensor, probs: Tensor, serial: Tensor, valid_whole: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = logits
        if self.training:  # each rank computes all of the sequence: the sums over it come out alike
            whole = self.sequence.whole(logits.detach())
            scores = logits.detach() + expert_handicaps(whole, valid_whole).to(logits.dtype).unsqueeze(1)
        return super().decide(scores, probs, serial, valid_whole)


def expert_handicaps(logits: Tensor, valid: Tensor) -> Tensor:
    """Find what to add to each expert's logits so that, after a softmax, every expert has the same sum over tokens.

    logits: [groups, tokens, experts]. valid: [groups, tokens] bool. -> [groups, experts] float64
    """
    logits = logits.double().log_softmax(-1)
    own = torch.where(valid.unsqueeze(-1), 0.0, -math.inf)  # padding adds nothing to any sum
    handicap = logits.new_zeros(len(logits), 1, logits.shape[-1])
    for _ in range(SINKHORN_ROUNDS):
        plan = (logits + handicap).log_softmax(-1)  # each token gives one
        load = (plan + own).logsumexp(1, keepdim=True)
        handicap = handicap - (load - load.mean(-1, keepdim=True)).nan_to_num(0.0)  # nan: no token at all
    return handicap.squeeze(1)
