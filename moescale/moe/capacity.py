"""Who finds room with an expert, group by group.

Every rank that holds a part of a group is shown the whole of it, in integers, and so decides as the others do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def within_capacity(expert: Tensor, wanted: Tensor, room: Tensor) -> Tensor:
    """Keep the first assignments of each expert in each group, as many as it has room for.

    Every first choice of the group comes before every second choice; among equals the earlier token (GShard, alg. 1).
    expert: [groups, tokens, choices] int64. wanted: the same shape, bool; others take no slot.
    room: [groups, experts] int64. -> [groups, tokens, choices] bool, a subset of wanted
    """
    groups, tokens, choices = expert.shape
    place = torch.arange(groups, device=expert.device).view(-1, 1, 1) * room.shape[1] + expert
    key = torch.where(wanted, place, room.numel())
    key = key.transpose(1, 2).flatten()  # [groups x choices x tokens], the order of priority
    order = key.argsort(stable=True)
    sorted_key = key[order]
    first = torch.searchsorted(sorted_key, sorted_key)  # where this expert's run begins
    slot = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=key.device) - first)
    slot = slot.view(groups, choices, tokens).transpose(1, 2)
    return wanted & (slot < room.take(place))


def place_left_behind(expert: Tensor, wanted: Tensor, room: Tensor) -> Tensor:
    """Give each token one expert: the first of its choices that has room when its turn comes.

    Stage after stage, the tokens that are still without one try their next choice, in order, for the room that is left
    (no token left behind; Switch Transformers, appendix B).
    expert, wanted: [groups, tokens, choices] int64 and bool. room: [groups, experts] int64.
    -> [groups, tokens, choices] bool, at most one choice of each token
    """
    kept = torch.zeros_like(wanted)
    for choice in range(expert.shape[2]):
        stage = slice(choice, choice + 1)
        trying = wanted[..., stage] & ~kept.any(-1, keepdim=True)
        kept[..., stage] = within_capacity(expert[..., stage], trying, room)
        taken = torch.zeros_like(room).scatter_add_(1, expert[..., choice], kept[..., choice].long())
        room = room - taken
    return kept


def in_order(scores: Tensor) -> Tensor:
    """Order the tokens of each group: the highest score first, among equals the earlier one.

    scores: [groups, tokens] int32. -> [groups, tokens] int64, indices of tokens
    """
    return scores.argsort(dim=1, descending=True, stable=True)


def best_tokens(scores: Tensor, valid: Tensor, capacity: Tensor) -> Tensor:
    """Let each expert of each group take the `capacity` tokens that score highest; among equals the earlier one.

    scores: [groups, tokens, experts] int32, not below zero. valid: [groups, tokens] bool. capacity: [groups] int64.
    -> [groups, tokens, experts] bool
    """
    valid = valid.unsqueeze(-1)
    order = in_order(torch.where(valid, scores, -1))
    place = torch.arange(scores.shape[1], device=scores.device).view(1, -1, 1).expand_as(order)
    slot = torch.empty_like(order).scatter_(1, order, place)
    return valid & (slot < capacity.view(-1, 1, 1))


def coarse(probs: Tensor) -> Tensor:
    """Make probabilities of different tokens comparable: [...] float, not below zero -> [...] int32, in their order.

    Equal tokens, such as the first of each document, differ by rounding alone, in each layout otherwise. In fewer bits
    they are equal, and the earlier one comes first. The bits of positive floats sort as the floats do.
    """
    return probs.detach().float().contiguous().view(torch.int32) >> 8
