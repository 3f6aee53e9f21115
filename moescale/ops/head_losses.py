"""Cross entropy and z-loss straight from features and head, some tokens at a time: the logits never exist at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.collectives import Group
from moescale.ops.device import triton_runs

CHUNK_BYTES = 2**28  # of one chunk's logits in float32


def head_losses(
    x: Tensor, weight: Tensor, targets: Tensor, *, logit_scale: float = 1.0, first_token: int = 0,
    group: Group | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Add up negative log-likelihood and squared log-normaliser over targets that are not ignored (PaLM, sec. 5).

    x: [tokens, d_model]. weight: [vocab/tp, d_model], rows of tokens from first_token on. group: ranks that share
    the vocabulary; they exchange two numbers a token, and each gets its own part of the gradient of x.
    targets: [tokens] int64, -100 = ignored. chunk: tokens at a time. -> two scalars, in at least float32
    """
    if chunk is None:
        chunk = max(1, CHUNK_BYTES // (4 * len(weight)))
    return _HeadLosses.apply(x, weight, targets, logit_scale, first_token, group, chunk)


def head_losses_reference(x: Tensor, weight: Tensor, targets: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Do the same with all logits at once, on one rank, by torch's own functions."""
    logits = (x @ weight.T) * logit_scale
    z = torch.logsumexp(logits, -1).square().masked_fill(targets == -100, 0).sum()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"), z


class _HeadLosses(torch.autograd.Function):
    """Kept for backward: features and a log-normaliser a token; the logits are computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, logit_scale: float, first_token: int, group: Group | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        column = targets - first_token
        here = (column >= 0) & (column < len(weight))
        column = torch.where(here, column, -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        log_sum, chosen = x.new_empty(len(x), dtype=wide), x.new_empty(len(x), dtype=wide)
        for part in _parts(len(x), chunk):
            log_sum[part], chosen[part] = _normalise(x[part] @ weight.T, column[part], logit_scale)
        if group is not None:
            top = log_sum.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            sums = torch.stack(((log_sum - top).exp(), chosen))
            dist.all_reduce(sums, group=group)
            log_sum, chosen = top + sums[0].log(), sums[1]
        valid = targets != -100
        ctx.logit_scale, ctx.chunk = logit_scale, chunk
        ctx.save_for_backward(x, weight, column, valid, log_sum)
        return ((log_sum - chosen) * valid).sum(), (log_sum.square() * valid).sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, column, valid, log_sum = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=log_sum.dtype)
        of_chosen = grad_loss * valid * ctx.logit_scale  # [tokens]
        of_probs = of_chosen + 2 * ctx.logit_scale * grad_z * log_sum * valid
        for part in _parts(len(x), ctx.chunk):
            logits = x[part] @ weight.T
            grad = _grad_logits(logits, column[part], log_sum[part], of_probs[part], of_chosen[part], ctx.logit_scale)
            torch.mm(grad, weight, out=grad_x[part])
            grad_weight += grad.T @ x[part]
        return grad_x, grad_weight.to(weight.dtype), None, None, None, None, None


def _parts(tokens: int, chunk: int) -> Iterator[slice]:
    for start in range(0, tokens, chunk):
        yield slice(start, min(start + chunk, tokens))


def _normalise(logits: Tensor, column: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """-> log-normaliser and the logit at the column, zero where that is -1, [tokens] each"""
    if triton_runs(logits):
        from moescale.ops.head_losses_triton import normalise

        return normalise(logits, column, scale)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    chosen = logits.gather(1, column.clamp(min=0).unsqueeze(1)).squeeze(1)
    return logits.logsumexp(-1), chosen.masked_fill(column < 0, 0)


def _grad_logits(
    logits: Tensor, column: Tensor, log_sum: Tensor, of_probs: Tensor, of_chosen: Tensor, scale: float
) -> Tensor:
    """-> probabilities times of_probs, less of_chosen at the column; in the place and dtype of the logits"""
    if triton_runs(logits):
        from moescale.ops.head_losses_triton import grad_logits

        return grad_logits(logits, column, log_sum, of_probs, of_chosen, scale)
    grad = (logits.to(log_sum.dtype) * scale).sub_(log_sum.unsqueeze(1)).exp_().mul_(of_probs.unsqueeze(1))
    less = torch.where(column < 0, 0, of_chosen).neg().unsqueeze(1)
    return grad.scatter_add_(1, column.clamp(min=0).unsqueeze(1), less).to(logits.dtype)
