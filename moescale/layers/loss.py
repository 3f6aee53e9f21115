"""Losses of the output distribution, as sums over tokens; whoever knows the global count divides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Add up the negative log-likelihood, in nats, of all targets that are not ignored.

    logits: [tokens, vocab] float32. targets: [tokens] int64, -100 = ignored. -> scalar float32
    """
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def output_z_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Add up the squared log-normaliser over all targets that are not ignored (PaLM, sec. 5).

    logits: [tokens, vocab] float32. targets: [tokens] int64. -> scalar float32
    """
    return torch.logsumexp(logits, -1).square().masked_fill(targets == -100, 0).sum()
