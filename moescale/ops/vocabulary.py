"""Cross entropy and z-loss of logits whose vocabulary is cut over the ranks of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moescale.ops.collectives import Group


def vocabulary_losses(logits: Tensor, targets: Tensor, first_token: int, group: Group) -> tuple[Tensor, Tensor]:
    """Add up the negative log-likelihood and the squared log-normaliser of all targets that are not ignored.

    The logits never come together: ranks exchange each token's maximum, then its normaliser and its target's logit
    (Shoeybi et al., 2019, sec. 3). Every rank gets the whole sums, and the gradient of its own logits.
    logits: [tokens, vocab/tp] of tokens from first_token on. targets: [tokens] int64, -100 = ignored.
    -> cross entropy and z-loss, scalars (PaLM, sec. 5)
    """
    return _VocabularyLosses.apply(logits, targets, first_token, group)


class _VocabularyLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first_token: int, group: Group
    ) -> tuple[Tensor, Tensor]:
        top = logits.amax(-1)  # [tokens]
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        column = targets - first_token
        here = (column >= 0) & (column < logits.shape[-1])
        column = column.masked_fill(~here, 0).unsqueeze(-1)
        of_target = logits.gather(-1, column).squeeze(-1).masked_fill(~here, 0)
        sums = torch.stack(((logits - top.unsqueeze(-1)).exp_().sum(-1), of_target))  # [2, tokens]
        dist.all_reduce(sums, group=group)
        valid = targets != -100
        normaliser = sums[0].log() + top
        ctx.save_for_backward(logits, normaliser, column, here, valid)
        return ((normaliser - sums[1]) * valid).sum(), (normaliser.square() * valid).sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_z: Tensor) -> tuple[Tensor, None, None, None]:
        logits, normaliser, column, here, valid = ctx.saved_tensors
        grad = (logits - normaliser.unsqueeze(-1)).exp_()  # the probabilities
        grad *= ((grad_loss + 2 * grad_z * normaliser) * valid).unsqueeze(-1)
        grad.scatter_add_(-1, column, -(grad_loss * (here & valid)).to(grad.dtype).unsqueeze(-1))
        return grad, None, None, None
