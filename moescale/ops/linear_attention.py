"""Causal sums of outer products of keys and values: what linear attention computes instead of scores.

A recurrence whose state is a matrix for each head (Katharopoulos et al., 2020, sec. 3.3). Chunks make it products of
matrices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # positions; longer ones cost more products, shorter ones more steps from chunk to chunk


def causal_sums_loop(
    q: Tensor, k: Tensor, v: Tensor, restarts: Tensor, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Step from position to position: the reference of `causal_sums`, with the same arguments."""
    state = _zeros(q, v) if first is None else first
    outs = []
    for index in range(q.shape[1]):
        state = state.masked_fill(restarts[:, index, None, None, None], 0)
        state = state + k[:, index].unsqueeze(-1) * v[:, index].unsqueeze(-2)
        outs.append((q[:, index].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outs, 1), state


def causal_sums(
    q: Tensor, k: Tensor, v: Tensor, restarts: Tensor, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Multiply each query with the sum of k v^T of its document up to itself.

    q, k: [batch, seq, heads, features]. v: [batch, seq, heads, values]. restarts: [batch, seq] bool, where a document
    begins and the sum with it. first: the sum before, [batch, heads, features, values]; None = zeros. Returns
    [batch, seq, heads, values] and the last sum.
    """
    seq = q.shape[1]
    size = min(CHUNK, seq)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -seq % size)).unflatten(1, (-1, size)).transpose(2, 3) for x in (q, k, v))
    restarts = F.pad(restarts, (0, -seq % size)).unflatten(1, (-1, size))
    document = restarts.cumsum(2)  # [batch, chunks, size], of its chunk: 0 goes on from the chunk before
    # Within a chunk: scores, masked.
    mask = (document.unsqueeze(3) == document.unsqueeze(2)).tril()
    within = ((q @ k.mT) * mask.unsqueeze(2)) @ v
    # From chunk to chunk: what each adds to the sum is known at once, and steps are as many as chunks.
    lasts = (document == document[..., -1:])[:, :, None, :, None]
    added = (k * lasts).mT @ v  # [batch, chunks, heads, features, values]
    ends = restarts.any(2)[:, :, None, None, None]
    state = _zeros(q.transpose(2, 3)[:, 0], v.transpose(2, 3)[:, 0]) if first is None else first
    before = []
    for end, addend in zip(ends.unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = state.masked_fill(end, 0) + addend
    goes_on = (document == 0)[:, :, None, :, None]
    across = (q * goes_on) @ torch.stack(before, 1)
    return (within + across).transpose(2, 3).flatten(1, 2)[:, :seq], state


def _zeros(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[3])
