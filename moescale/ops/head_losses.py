"""Cross entropy and z-loss straight from features and head, a chunk of tokens at a time: never all logits at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moescale.comm.collectives import Group
from moescale.ops import native
from moescale.ops.device import triton_runs
from moescale.ops.product import multiply

CHUNK = 2**26  # logits that are in memory at a time
IN_CACHE = 2**17  # logits of a chunk that a processor works on at a time


def head_losses(
    x: Tensor, weight: Tensor, targets: Tensor, *, logit_scale: float = 1.0, first_token: int = 0,
    group: Group | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum negative log-likelihood and squared log-normaliser over targets that are not ignored (PaLM, sec. 5).

    Logits that fit into one chunk are kept for backward; otherwise they are computed again.
    x: [tokens, d_model]. weight: [vocab/tp, d_model], the rows of tokens from first_token on, cast to the dtype of x.
    targets: [tokens] int64, -100 = ignored. chunk: tokens at a time.
    group: ranks that share the vocabulary. They exchange three numbers per token (Shoeybi et al., 2019, sec. 3); each
    gets the whole sums, and its own part of the gradient of x. -> two scalars, in at least float32
    """
    if chunk is None:
        chunk = max(1, CHUNK // len(weight))
    return _HeadLosses.apply(x, weight, targets, logit_scale, first_token, group, chunk)


def head_losses_reference(x: Tensor, weight: Tensor, targets: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Compute the same with all logits at once, on one rank, by torch's own functions."""
    logits = (x @ weight.T) * logit_scale
    z = torch.logsumexp(logits, -1).square().masked_fill(targets == -100, 0).sum()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"), z


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, logit_scale: float, first_token: int, group: Group | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        # The column of each target in this rank's part of the vocabulary, -1 = elsewhere or ignored.
        column = targets - first_token
        column = torch.where((column >= 0) & (column < len(weight)), column, -1)
        matrix = weight.to(x.dtype)
        logits = x.new_empty(min(chunk, len(x)), len(weight))
        dtype = torch.promote_types(x.dtype, torch.float32)
        log_sum, chosen = x.new_empty(len(x), dtype=dtype), x.new_empty(len(x), dtype=dtype)
        # The log-normaliser and the target's logit, chunk by chunk.
        for tokens in _chunks(len(x), chunk):
            chunk_logits = multiply(x[tokens], matrix.T, logits[: tokens.stop - tokens.start])
            log_sum[tokens], chosen[tokens] = _normalise(chunk_logits, column[tokens], logit_scale)
        # Ranks that share the vocabulary: the largest first, so that no exponential overflows.
        if group is not None:
            top = log_sum.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            sums = torch.stack(((log_sum - top).exp(), chosen))
            dist.all_reduce(sums, group=group)
            log_sum, chosen = top + sums[0].log(), sums[1]
        valid = targets != -100
        ctx.logit_scale, ctx.chunk = logit_scale, chunk
        ctx.save_for_backward(x, weight, column, valid, log_sum, logits if len(x) <= chunk else None)
        return ((log_sum - chosen) * valid).sum(), (log_sum.square() * valid).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, column, valid, log_sum, kept = ctx.saved_tensors
        matrix = weight.to(x.dtype)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=log_sum.dtype)
        # Both losses are functions of probabilities and of the target's logit: one factor per token for each.
        grad_chosen = grad_loss * valid * ctx.logit_scale  # [tokens]
        grad_probs = grad_chosen + 2 * ctx.logit_scale * grad_z * log_sum * valid
        buffer = x.new_empty(min(ctx.chunk, len(x)), len(weight))
        for tokens in _chunks(len(x), ctx.chunk):
            grad = buffer[: tokens.stop - tokens.start]
            logits = multiply(x[tokens], matrix.T, grad) if kept is None else kept
            _grad_logits(logits, column[tokens], log_sum[tokens], grad_probs[tokens], grad_chosen[tokens],
                         ctx.logit_scale, grad)
            multiply(grad, matrix, grad_x[tokens])
            multiply(grad.T, x[tokens], grad_weight, accumulate=True)
        return grad_x, grad_weight.to(weight.dtype), None, None, None, None, None


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    for start in range(0, tokens, chunk):
        yield slice(start, min(start + chunk, tokens))


def _normalise(logits: Tensor, column: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute each token's log-normaliser, and its logit at the column.

    logits: [tokens, vocab/tp]. column: [tokens] int64, -1 = none, which gives zero. -> [tokens] each
    """
    if triton_runs(logits):
        from moescale.ops.head_losses_triton import normalise

        return normalise(logits, column, scale)
    if native.runs(logits):
        log_sum, chosen = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        native.call("normalise", logits.dtype, native.parts(*logits.shape), logits, column, float(scale),
                    *logits.shape, log_sum, chosen)
        return log_sum, chosen
    dtype, index = torch.promote_types(logits.dtype, torch.float32), column.clamp(min=0).unsqueeze(1)
    chosen = logits.gather(1, index).to(dtype) * scale
    log_sum = torch.empty_like(chosen)
    for tokens in _in_cache(logits):  # log_softmax is the fastest pass over rows that torch has
        block = logits[tokens].to(dtype)
        block = block if scale == 1 else block * scale
        log_sum[tokens] = chosen[tokens] - block.log_softmax(1).gather(1, index[tokens])
    return log_sum.squeeze(1), chosen.squeeze(1).masked_fill(column < 0, 0)


def _grad_logits(
    logits: Tensor, column: Tensor, log_sum: Tensor, grad_probs: Tensor, grad_chosen: Tensor, scale: float, out: Tensor
) -> None:
    """Write probs * grad_probs, minus grad_chosen at the column, into `out`, which may be the logits.

    logits, out: [tokens, vocab/tp]. column, log_sum, grad_probs, grad_chosen: [tokens]
    """
    if triton_runs(logits):
        from moescale.ops.head_losses_triton import grad_logits

        return grad_logits(logits, column, log_sum, grad_probs, grad_chosen, scale, out)
    if native.runs(logits):
        native.call("grad_logits", logits.dtype, native.parts(*logits.shape), logits, column, log_sum, grad_probs,
                    grad_chosen, float(scale), *logits.shape, out)
        return
    minus_chosen = torch.where(column < 0, 0, grad_chosen).neg_().unsqueeze(1)
    column, shift = column.clamp(min=0).unsqueeze(1), log_sum.neg().unsqueeze(1)
    grad_probs, downcast = grad_probs.unsqueeze(1), out.dtype != log_sum.dtype
    for tokens in _in_cache(logits):
        grad = torch.add(shift[tokens], logits[tokens].to(log_sum.dtype), alpha=scale,
                         out=None if downcast else out[tokens])
        grad.exp_().mul_(grad_probs[tokens]).scatter_add_(1, column[tokens], minus_chosen[tokens])
        if downcast:
            out[tokens] = grad


def _in_cache(logits: Tensor) -> Iterator[slice]:
    return _chunks(len(logits), max(1, IN_CACHE // logits.shape[1]))
