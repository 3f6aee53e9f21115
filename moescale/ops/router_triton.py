"""A router's choices in one pass over its logits, and rows sorted by expert; no atomics, a fixed order of sums.

A row of logits is loaded once for its maximum, its normaliser and its top_k (Milakov and Gimelshein, 2018, alg. 4, with
a row for a tile). Sums over tokens are first taken per block.

Letters: T tokens of a group, BLOCK of them per program; E experts, loaded as EXPERTS, a power of two; K choices.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def route(logits: Tensor, valid: Tensor, top_k: int, normalised: bool) -> tuple[Tensor, ...]:
    """Route as `ops.router.route_reference` does, in float32. Every row of logits must have a finite one."""
    return _Route.apply(logits, valid, top_k, normalised)


def rows_by_expert(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort as `ops.router.rows_by_expert` does, by a counting sort in two passes."""
    flat, block = expert.contiguous().flatten(), _block(num_experts)
    blocks = triton.cdiv(len(flat), block)
    order, row = torch.empty_like(flat), torch.empty_like(flat)
    counts = torch.empty(num_experts, blocks, dtype=torch.int64, device=expert.device)
    options = {"BLOCK": block, "EXPERTS": triton.next_power_of_2(num_experts), "num_warps": 4, "num_stages": 1}
    if blocks:
        _count[(blocks,)](flat, counts, len(flat), num_experts, **options)
        starts = (counts.flatten().cumsum(0) - counts.flatten()).contiguous()
        _assign_rows[(blocks,)](flat, starts, order, row, len(flat), num_experts, **options)
    return order, row.view_as(expert), counts.sum(1)


def _block(num_experts: int) -> int:
    """Count the rows of a tile that fits into the registers of 4 warps."""
    return max(1, min(64, 2048 // triton.next_power_of_2(num_experts)))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, valid: Tensor, top_k: int, normalised: bool) -> tuple[Tensor, ...]:
        logits, valid = logits.contiguous(), valid.contiguous()
        (groups, tokens, experts), block = logits.shape, _block(logits.shape[-1])
        blocks = triton.cdiv(tokens, block)
        weight = logits.new_empty(groups, tokens, top_k)
        expert = torch.empty(groups, tokens, top_k, dtype=torch.int64, device=logits.device)
        log_sum, z = logits.new_empty(groups, tokens), logits.new_empty(groups, blocks)
        probs = logits.new_empty(groups, blocks, experts)
        assignments = torch.empty(groups, blocks, experts, dtype=torch.int64, device=logits.device)
        if logits.numel():
            _forward[(blocks, groups)](
                logits, valid, weight, expert, log_sum, probs, assignments, z, tokens, experts,
                **_options(logits, top_k, normalised),
            )
        ctx.normalised = normalised
        ctx.save_for_backward(logits, valid, weight, expert, log_sum)
        assignments = assignments.sum(1)
        ctx.mark_non_differentiable(expert, assignments)
        return weight, probs.sum(1), z.sum(1), expert, assignments

    @staticmethod
    def backward(
        ctx: Any, grad_weight: Tensor, grad_probs: Tensor, grad_z: Tensor, *_: None
    ) -> tuple[Tensor, None, None, None]:
        logits, valid, weight, expert, log_sum = ctx.saved_tensors
        grad = torch.empty_like(logits)
        if logits.numel():
            options = _options(logits, weight.shape[-1], ctx.normalised)
            _backward[(triton.cdiv(logits.shape[1], options["BLOCK"]), len(logits))](
                logits, valid, weight, expert, log_sum, grad_weight.contiguous(), grad_probs.contiguous(),
                grad_z.contiguous(), grad, *logits.shape[1:], **options,
            )
        return grad, None, None, None


def _options(logits: Tensor, top_k: int, normalised: bool) -> dict[str, Any]:
    experts = logits.shape[-1]
    return {"K": top_k, "NORMALISED": normalised, "BLOCK": _block(experts),
            "EXPERTS": triton.next_power_of_2(experts), "num_warps": 4, "num_stages": 1}


@triton.jit
def _forward(
    Logits, Valid, Weight, Expert, LogSum, Probs, Assignments, Z, T, E, K: tl.constexpr, NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):
    """Route a block of tokens: choices, weights, log-normalisers, and the block's sums over valid tokens."""
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, expert = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
    row, here = group * T + token, token < T
    logits = tl.load(Logits + row[:, None] * E + expert[None, :], mask=here[:, None] & (expert < E)[None, :],
                     other=float("-inf"))
    logits = tl.where(here[:, None], logits, 0.0)
    valid = tl.load(Valid + row, mask=here, other=0).to(tl.int32) != 0
    # The normaliser of all logits.
    top = tl.max(logits, 1)
    total = tl.sum(tl.exp(logits - top[:, None]), 1)
    log_sum = top + tl.log(total)
    # The choices, best first; each one's logit is taken out before the next.
    counts = tl.zeros((BLOCK, EXPERTS), tl.int32)
    chosen_total, rest = tl.zeros((BLOCK,), tl.float32), logits
    for choice in tl.static_range(K):
        best, index = tl.max(rest, 1, return_indices=True, return_indices_tie_break_left=True)
        index = tl.minimum(index, E - 1)  # whatever it is where logits are no numbers, so that the loss can say so
        taken = expert[None, :] == index[:, None]
        rest = tl.where(taken, float("-inf"), rest)
        counts += (taken & valid[:, None]).to(tl.int32)
        chosen_total += tl.exp(best - top)
        tl.store(Expert + row * K + choice, index.to(tl.int64), mask=here)
        tl.store(Weight + row * K + choice, tl.exp(best - (top if NORMALISED else log_sum)), mask=here)
    if NORMALISED:
        for choice in tl.static_range(K):
            ptr_weight = Weight + row * K + choice
            tl.store(ptr_weight, tl.load(ptr_weight, mask=here, other=0.0) / chosen_total, mask=here)
    tl.store(LogSum + row, log_sum, mask=here)
    # The block's sums over valid tokens.
    probs = tl.where(valid[:, None], tl.exp(logits - log_sum[:, None]), 0.0)
    block_index = group * tl.num_programs(0) + block
    tl.store(Probs + block_index * E + expert, tl.sum(probs, 0), mask=expert < E)
    tl.store(Assignments + block_index * E + expert, tl.sum(counts, 0).to(tl.int64), mask=expert < E)
    tl.store(Z + block_index, tl.sum(tl.where(valid, log_sum * log_sum, 0.0)))


@triton.jit
def _backward(
    Logits, Valid, Weight, Expert, LogSum, GradWeight, GradProbs, GradZ, Grad, T, E, K: tl.constexpr,
    NORMALISED: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):
    """Compute the gradient of a block's logits: through weights, summed probabilities and log-normalisers."""
    group = tl.program_id(1).to(tl.int64)
    token, expert = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
    row, here = group * T + token, token < T
    mask = here[:, None] & (expert < E)[None, :]
    logits = tl.load(Logits + row[:, None] * E + expert[None, :], mask=mask, other=float("-inf"))
    log_sum = tl.load(LogSum + row, mask=here, other=0.0)
    valid = tl.load(Valid + row, mask=here, other=0).to(tl.float32)
    probs = tl.exp(logits - log_sum[:, None])
    grad_probs = tl.load(GradProbs + group * E + expert, mask=expert < E, other=0.0)[None, :] * valid[:, None]
    grad_log_sum = 2 * tl.load(GradZ + group) * log_sum * valid
    # The chosen experts' weights and their gradients, spread over all experts.
    product = tl.zeros((BLOCK,), tl.float32)  # the sum of weight times gradient
    grad_chosen = tl.zeros((BLOCK, EXPERTS), tl.float32)
    chosen = tl.zeros((BLOCK, EXPERTS), tl.float32)
    for choice in tl.static_range(K):
        index = tl.load(Expert + row * K + choice, mask=here, other=-1)
        weight = tl.load(Weight + row * K + choice, mask=here, other=0.0)
        grad = tl.load(GradWeight + row * K + choice, mask=here, other=0.0)
        taken = expert[None, :] == index[:, None]
        product += weight * grad
        grad_chosen += tl.where(taken, grad[:, None], 0.0)
        chosen += tl.where(taken, weight[:, None], 0.0)
    if NORMALISED:  # a softmax over the chosen alone
        grad_logits = chosen * (grad_chosen - product[:, None])
    else:
        grad_logits = tl.zeros((BLOCK, EXPERTS), tl.float32)
        grad_probs += grad_chosen
    grad_logits += probs * (grad_probs - tl.sum(probs * grad_probs, 1)[:, None] + grad_log_sum[:, None])
    tl.store(Grad + row[:, None] * E + expert[None, :], grad_logits, mask=mask)


@triton.jit
def _count(Expert, Counts, A, E, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """Count how many of a block's assignments each expert has. Counts: [experts, blocks]"""
    block, expert = tl.program_id(0), tl.arange(0, EXPERTS)
    assignment = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(Expert + assignment, mask=assignment < A, other=-1)
    counts = tl.sum((chosen[:, None] == expert[None, :]).to(tl.int64), 0)
    tl.store(Counts + expert * tl.num_programs(0) + block, counts, mask=expert < E)


@triton.jit
def _assign_rows(Expert, Starts, Order, Row, A, E, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """Compute the row of each assignment: where the block's rows of its expert begin, plus those before it there."""
    block, expert = tl.program_id(0), tl.arange(0, EXPERTS)
    assignment = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(Expert + assignment, mask=assignment < A, other=-1)
    taken = (chosen[:, None] == expert[None, :]).to(tl.int64)  # [BLOCK, EXPERTS]
    start = tl.load(Starts + expert * tl.num_programs(0) + block, mask=expert < E, other=0)
    row = tl.sum(taken * (start[None, :] + tl.cumsum(taken, 0)), 1) - 1  # -1 where none is chosen
    tl.store(Row + assignment, row, mask=assignment < A)
    tl.store(Order + row, assignment.to(tl.int64), mask=(row >= 0) & (assignment < A))
