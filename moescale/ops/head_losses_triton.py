"""The two passes of `head_losses` over a chunk of logits: their normaliser, and their gradient in place.

The normaliser is online (Milakov and Gimelshein, 2018, alg. 3): the maximum and the sum are corrected block by block.
Letters: V tokens of the vocabulary, of which BLOCK are loaded at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def normalise(logits: Tensor, column: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute each token's log-normaliser, and its logit at the column.

    logits: [tokens, vocab]. column: [tokens] int64, -1 = none, which gives zero. -> [tokens] float32 each
    """
    log_sum = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    chosen = torch.empty_like(log_sum)
    if len(logits):
        _normalise[(len(logits),)](logits, column, log_sum, chosen, logits.shape[1], scale, **_options(logits))
    return log_sum, chosen


def grad_logits(
    logits: Tensor, column: Tensor, log_sum: Tensor, grad_probs: Tensor, grad_chosen: Tensor, scale: float, out: Tensor
) -> None:
    """Write probs * grad_probs, minus grad_chosen at the column, into `out`, which may be the logits.

    logits, out: [tokens, vocab]. column, log_sum, grad_probs, grad_chosen: [tokens]
    """
    if len(logits):
        _gradient[(len(logits), triton.cdiv(logits.shape[1], BLOCK))](
            logits, column, log_sum, grad_probs, grad_chosen, out, logits.shape[1], scale, **_options(logits)
        )


def _options(logits: Tensor) -> dict[str, int]:
    return {"BLOCK": BLOCK, "num_warps": 8, "num_stages": 2}


@triton.jit
def _normalise(Logits, Column, LogSum, Chosen, V, scale, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -1e30, tl.float32)  # each lane has its own until the end
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(Logits + row * V + start + block, mask=start + block < V, other=float("-inf"))
        x = x.to(tl.float32) * scale
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    highest = tl.max(top)
    tl.store(LogSum + row, highest + tl.log(tl.sum(total * tl.exp(top - highest))))
    column = tl.load(Column + row)
    chosen = tl.load(Logits + row * V + tl.maximum(column, 0)).to(tl.float32) * scale
    tl.store(Chosen + row, tl.where(column >= 0, chosen, 0.0))


@triton.jit
def _gradient(Logits, Column, LogSum, GradProbs, GradChosen, Grad, V, scale, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(Logits + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32) * scale
    grad = tl.exp(x - tl.load(LogSum + row)) * tl.load(GradProbs + row)
    grad -= tl.where(column == tl.load(Column + row), tl.load(GradChosen + row), 0.0)
    tl.store(Grad + row * V + column, grad.to(Grad.dtype.element_ty), mask=column < V)
