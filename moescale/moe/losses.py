"""Losses of a router, as sums over its valid tokens; the engine divides by the global count."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balance_loss(mass: Tensor, choices: Tensor) -> Tensor:
    """Pull the router toward equal load, scope by scope (Switch Transformers, eq. 4).

    A scope's loss is experts * sum over experts of (share of its choices) * (mean probability): one when both are
    uniform, `experts` when all tokens go to one expert. It counts once per valid token of the scope.
    mass: [groups, experts] float32, probabilities summed over some of the scope's valid tokens.
    choices: [groups or 1, experts] int64, of all tokens of each scope, before anything is dropped.
    -> scalar float32, the part of these tokens
    """
    share = (choices.double() / choices.sum(-1, keepdim=True).clamp(min=1)).to(mass.dtype)
    # the mean probability times the scope's tokens is its sum: the division by the count and the weight cancel
    return mass.shape[-1] * (share * mass).sum()


def router_z_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Sum the squared log-normalisers over valid tokens, which keeps the router's logits small (ST-MoE, eq. 5).

    logits: [groups, tokens, experts] float32. valid: [groups, tokens] bool. -> scalar float32
    """
    return (torch.logsumexp(logits, -1).square() * valid).sum()
