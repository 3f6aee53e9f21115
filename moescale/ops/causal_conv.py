"""The short convolution of a recurrent mixer: each channel by itself, over a few positions of one document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, before: Tensor) -> Tensor:
    """Convolve along the sequence: y_t = bias + sum_j weight_(width - 1 - j) x_(t - j), within a document.

    x: [batch, seq, channels]. weight: [channels, width], bias: [channels], both in the dtype of x. positions: [batch,
    seq] int64, from 0 in each document. before: [batch, width - 1, channels], the inputs before the sequence.
    Returns y like x. Of several products only the inputs are kept for backward.
    """
    return _Convolution.apply(torch.cat((before, x), 1), weight, bias, positions)


def causal_conv_reference(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, before: Tensor) -> Tensor:
    """Compute the same product by product, by autograd alone."""
    width, joined, outs = weight.shape[1], torch.cat((before, x), 1), []
    for t in range(x.shape[1]):
        out = bias.expand_as(x[:, t])
        for back in range(width):
            seen = (positions[:, t] >= back).unsqueeze(-1)
            out = out + seen * weight[:, width - 1 - back] * joined[:, t + width - 1 - back]
        outs.append(out)
    return torch.stack(outs, 1)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(joined, weight, positions)
        seq, width = positions.shape[1], weight.shape[1]
        y = bias + joined[:, width - 1 :] * weight[:, -1]
        for back in range(1, width):
            first = width - 1 - back
            y.addcmul_(_seen(joined[:, first : first + seq], positions, back), weight[:, first])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        joined, weight, positions = ctx.saved_tensors
        seq, width = positions.shape[1], weight.shape[1]
        grad_joined, grad_weight = torch.zeros_like(joined), torch.empty_like(weight)
        for back in range(width):
            first = width - 1 - back
            seen = _seen(grad, positions, back)
            grad_joined[:, first : first + seq].addcmul_(seen, weight[:, first])
            grad_weight[:, first] = (seen * joined[:, first : first + seq]).sum((0, 1))
        return grad_joined, grad_weight, grad.sum((0, 1)), None


def _seen(x: Tensor, positions: Tensor, back: int) -> Tensor:
    """Set to zero what is at positions that do not look so far back."""
    return x if back == 0 else x.masked_fill((positions < back).unsqueeze(-1), 0)
