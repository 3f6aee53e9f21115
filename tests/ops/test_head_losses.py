"""Losses straight from the head, of a vocabulary that two ranks share, against one rank's."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moescale.ops.head_losses import head_losses, head_losses_reference
from moescale.parallel.ranks import run_ranks

VOCAB, TOKENS = 11, 9


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(TOKENS, 8, dtype=torch.float64), torch.randn(VOCAB, 8, dtype=torch.float64)
    return x.requires_grad_(), weight, torch.tensor([0, 5, 6, 10, -100, 3, 7, 1, 10])


def part(bounds: list[int]) -> list[torch.Tensor]:
    """-> both losses, the gradients of x (this rank's part of it) and of this rank's rows of the head"""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, weight, targets = inputs()
    own = weight[bounds[rank] : bounds[rank + 1]].requires_grad_()
    loss, z = head_losses(x, own, targets, first_token=bounds[rank], group=dist.group.WORLD, chunk=4, logit_scale=0.5)
    grads = torch.autograd.grad(loss + 0.3 * z, (x, own))
    return [loss.detach(), z.detach(), *grads]


def test_two_ranks_share_the_vocabulary() -> None:
    ranks = run_ranks(2, part, [0, 6, VOCAB])
    x, weight, targets = inputs()
    loss, z = head_losses_reference(x, weight.requires_grad_(), targets, 0.5)
    of_x, of_weight = torch.autograd.grad(loss + 0.3 * z, (x, weight))
    for rank in ranks:
        torch.testing.assert_close(rank[0], loss.detach())
        torch.testing.assert_close(rank[1], z.detach())
    torch.testing.assert_close(ranks[0][2] + ranks[1][2], of_x)
    torch.testing.assert_close(torch.cat((ranks[0][3], ranks[1][3])), of_weight)
