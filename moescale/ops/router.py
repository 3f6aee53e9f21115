"""Turns a router's logits into choices, weights and sums, and choices into rows sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moescale.ops import native
from moescale.ops.device import triton_runs

FEW = 32  # of so many choices each score is compared with those before it; of more, scores are sorted


def route_reference(logits: Tensor, valid: Tensor, top_k: int, normalised: bool) -> tuple[Tensor, ...]:
    """Choose each token's top_k experts, the lower number among equals, with plain torch and autograd.

    logits: [groups, tokens, experts]. valid: [groups, tokens] bool, the tokens that the sums count.
    normalised: weights are a softmax over the chosen logits (Mixtral), otherwise probabilities (Switch Transformers).
    -> weight: [groups, tokens, top_k]; probs: [groups, experts], summed over valid tokens; z: [groups], squared
    log-normalisers, summed the same way; expert: [groups, tokens, top_k] int64; assignments: [groups, experts] int64,
    those of valid tokens
    """
    probs, mask = logits.softmax(-1), valid.unsqueeze(-1)
    order = logits.sort(dim=-1, descending=True, stable=True)
    expert = order.indices[..., :top_k]
    weight = order.values[..., :top_k].softmax(-1) if normalised else probs.gather(-1, expert)
    z = (logits.logsumexp(-1).square() * valid).sum(-1)
    assignments = logits.new_zeros(len(logits), logits.shape[-1], dtype=torch.int64)
    assignments.scatter_add_(1, expert.flatten(1), mask.expand_as(expert).flatten(1).long())
    return weight, (probs * mask).sum(1), z, expert, assignments


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take the k largest along the last dim, the largest first, the lower index among equals.

    scores: [..., n]. -> values, indices: [..., k]
    """
    if scores.dtype == torch.float32 and 0 < k <= min(FEW, scores.shape[-1]) and native.runs(scores):
        rows = scores.detach().contiguous().view(-1, scores.shape[-1])
        values, indices = rows.new_empty(len(rows), k), rows.new_empty(len(rows), k, dtype=torch.int64)
        native.call("largest", rows.dtype, native.parts(*rows.shape), rows, *rows.shape, k, values, indices)
        indices = indices.view(*scores.shape[:-1], k)
        return scores.gather(-1, indices), indices
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def rows_by_expert(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the assignments by expert, and those of an expert by token.

    expert: [tokens, choices] int64, -1 = no row. -> order: [tokens x choices], the assignment of each row, valid up to
    the sum of the counts; row: [tokens, choices], its inverse, -1 = none; tokens_per_expert: [experts]; all int64
    """
    if triton_runs(expert):
        from moescale.ops import router_triton

        return router_triton.rows_by_expert(expert, num_experts)
    if native.runs(expert):
        expert = expert.contiguous()
        order, row = expert.new_empty(expert.numel()), torch.empty_like(expert)
        counts, ends = (expert.new_empty(size) for size in (num_experts, num_experts + 1))
        native.call("sort_rows", expert.dtype, expert, expert.numel(), num_experts, order, row, counts, ends)
        return order, row, counts
    return rows_by_expert_reference(expert, num_experts)


def rows_by_expert_reference(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same with torch's stable sort."""
    key = torch.where(expert < 0, num_experts, expert).flatten()  # what has no row sorts to the end
    order = key.argsort(stable=True)
    ends = torch.searchsorted(key[order], torch.arange(num_experts, device=key.device), right=True)
    row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=key.device))
    return order, torch.where(row < ends[-1], row, -1).view_as(expert), torch.diff(ends, prepend=ends.new_zeros(1))
