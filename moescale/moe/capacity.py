"""Capacity: which assignments get one of an expert's slots, group by group.

Every rank that holds a part of a group sees all of it, in integers, and so decides as the others do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def within_capacity(expert: Tensor, wanted: Tensor, slots: Tensor) -> Tensor:
    """Keep the first assignments of each expert in each group, as many as it has slots.

    All first choices of the group come before all second ones, and among those the earlier token (GShard, alg. 1).
    expert: [groups, tokens, choices] int64. wanted: the same shape, bool; others take no slot.
    slots: [groups, experts] int64. -> [groups, tokens, choices] bool, a subset of wanted
    """
    groups, tokens, choices = expert.shape
    # Sort by expert within a group, stably in the order of priority; what is not wanted sorts to the end.
    group_expert = torch.arange(groups, device=expert.device).view(-1, 1, 1) * slots.shape[1] + expert
    key = torch.where(wanted, group_expert, slots.numel())
    key = key.transpose(1, 2).flatten()  # [groups x choices x tokens], the order of priority
    order = key.argsort(stable=True)
    sorted_key = key[order]
    # The slot of an assignment is its index within the expert's run.
    first = torch.searchsorted(sorted_key, sorted_key)
    slot = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=key.device) - first)
    slot = slot.view(groups, choices, tokens).transpose(1, 2)
    return wanted & (slot < slots.take(group_expert))


def assign_left_behind(expert: Tensor, wanted: Tensor, slots: Tensor) -> Tensor:
    """Give each token one expert: the first of its choices that has a slot left when its turn comes.

    Stage after stage, the tokens that are still without one try their next choice, in order, for the slots that are
    left (no token left behind; Switch Transformers, appendix B).
    expert, wanted: [groups, tokens, choices] int64 and bool. slots: [groups, experts] int64.
    -> [groups, tokens, choices] bool, at most one choice of each token
    """
    kept = torch.zeros_like(wanted)
    for choice in range(expert.shape[2]):
        stage = slice(choice, choice + 1)
        trying = wanted[..., stage] & ~kept.any(-1, keepdim=True)
        kept[..., stage] = within_capacity(expert[..., stage], trying, slots)
        taken = torch.zeros_like(slots).scatter_add_(1, expert[..., choice], kept[..., choice].long())
        slots = slots - taken
    return kept


def best_first(scores: Tensor) -> Tensor:
    """Sort the tokens of each group: the highest score first, among equals the earlier one.

    scores: [groups, tokens] int32. -> [groups, tokens] int64, indices of tokens
    """
    return scores.argsort(dim=1, descending=True, stable=True)


def best_tokens(scores: Tensor, valid: Tensor, capacity: Tensor) -> Tensor:
    """Let each expert of each group take the `capacity` tokens of highest score; among equals the earlier one.

    scores: [groups, tokens, experts] int32, not below zero. valid: [groups, tokens] bool. capacity: [groups] int64.
    -> [groups, tokens, experts] bool
    """
    valid = valid.unsqueeze(-1)
    order = best_first(torch.where(valid, scores, -1))
    rank = torch.arange(scores.shape[1], device=scores.device).view(1, -1, 1).expand_as(order)
    slot = torch.empty_like(order).scatter_(1, order, rank)
    return valid & (slot < capacity.view(-1, 1, 1))


def coarse(probs: Tensor) -> Tensor:
    """Round probabilities so that those of different tokens can be compared in every layout.

    Equal tokens, such as the first of each document, differ by rounding alone, and differently in each layout. In fewer
    bits they are equal, and the earlier one comes first. The bits of positive floats sort as the floats do.
    probs: [...] float, not negative. -> [...] int32, in the same order
    """
    return probs.detach().float().contiguous().view(torch.int32) >> 8
