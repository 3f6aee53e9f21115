"""Losses of the output distribution, as sums over tokens; whoever knows the global count divides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
IN_CACHE = 2**18  # logits that are worked on at a time

def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Add up the negative log-likelihood, in nats, of all targets that are not ignored.

    logits: [tokens, vocab] float32. targets: [tokens] int64, -100 = ignored. -> scalar float32
    """
    if logits.device.type == "cpu":
        return _CrossEntropy.apply(logits, targets)
    return cross_entropy_reference(logits, targets)


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """Do the same by torch's own function and autograd."""
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def output_z_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Add up the squared log-normaliser over all targets that are not ignored (PaLM, sec. 5).

    logits: [tokens, vocab] float32. targets: [tokens] int64. -> scalar float32
    """
    return torch.logsumexp(logits, -1).square().masked_fill(targets == -100, 0).sum()


class _CrossEntropy(torch.autograd.Function):
    """On a processor: some tokens after others, their logits in the cache; kept for backward are the logits alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        target = targets.clamp(min=0).unsqueeze(1)
        log_probs, chosen = torch.empty_like(logits[: _step(logits)]), logits.new_empty(target.shape)
        for part in _parts(logits):
            block = logits[part]
            block = aten._log_softmax.out(block, 1, False, out=log_probs[: len(block)])
            torch.gather(block, 1, target[part], out=chosen[part])
        return chosen.squeeze(1).masked_fill_(targets == -100, 0).sum().neg()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        share = (targets != -100).unsqueeze(1) * grad  # [tokens, 1]
        grad_logits = torch.empty_like(logits)
        for part in _parts(logits):
            aten._softmax.out(logits[part], 1, False, out=grad_logits[part]).mul_(share[part])
        return grad_logits.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), -share), None


def _step(logits: Tensor) -> int:
    return max(1, IN_CACHE // logits.shape[1])


def _parts(logits: Tensor) -> Iterator[slice]:
    for start in range(0, len(logits), _step(logits)):
        yield slice(start, start + _step(logits))
