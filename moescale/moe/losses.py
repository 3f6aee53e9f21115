"""Losses of a router, as sums over its valid tokens; whoever knows the global count divides."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balance_loss(probs: Tensor, choices: Tensor, valid: Tensor) -> Tensor:
    """Pull the router toward equal load, scope by scope (Switch Transformers, eq. 4).

    A scope's loss is experts x sum over experts of (share of its choices) x (mean probability): one when both are
    uniform, `experts` when all goes to one. It is counted once for each valid token of the scope.
    probs: [groups, tokens, experts] float32, of some of the scope's tokens. valid: [groups, tokens] bool.
    choices: [groups or 1, experts] int64, of all of each scope's tokens, before anything is dropped.
    -> scalar float32, what these tokens add to it
    """
    mask = valid.unsqueeze(-1).to(probs.dtype)
    share = (choices.double() / choices.sum(-1, keepdim=True).clamp(min=1)).to(probs.dtype)
    # the mean probability times the scope's tokens is its sum: the division by the count and the weight cancel
    return probs.shape[-1] * (share * (probs * mask).sum(1)).sum()


def router_z_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Keep the router's logits small: the squared log-normaliser, summed over tokens (ST-MoE, eq. 5).

    logits: [groups, tokens, experts] float32. valid: [groups, tokens] bool. -> scalar float32
    """
    return (torch.logsumexp(logits, -1).square() * valid).sum()
