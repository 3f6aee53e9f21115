"""State-space duality: a recurrence with one decay a head, as products of matrices within chunks (Dao & Gu, 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # positions


def ssd(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, restarts: Tensor, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of each head in at least float32, in memory linear in the sequence.

    h_t = exp(delta_t a) h_(t-1) + delta_t x_t b_t^T;  y_t = h_t c_t + d x_t
    x: [batch, seq, heads, head_dim]. delta: [batch, seq, heads]. a, d: [heads], a below zero. b, c: [batch, seq,
    groups, d_state], each for as many heads in order. restarts: [batch, seq] bool; there h starts from zero. first:
    [batch, heads, head_dim, d_state], the state before the sequence; None = zeros. Returns y like x, the last state
    like first.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    upcast_x, delta, a, b, c, d = (each.to(dtype) for each in (x, delta, a, b, c, d))
    (batch, seq, heads, head_dim), groups = x.shape, b.shape[2]
    # Chunks of equal length: a step of zero, behind the end, changes nothing.
    size = min(CHUNK, seq)
    padding = -seq % size
    taken, steps, b, c = (_chunks(each, size, padding) for each in (upcast_x * delta.unsqueeze(-1), delta * a, b, c))
    document = _chunks(restarts, size, padding).cumsum(2)  # in its chunk; 0 came from the chunk before
    grown = steps.cumsum(2)  # log of the decay since the chunk began: [batch, chunks, size, heads]

    # Within a chunk: what position i reads of what j took in, if both are of one document.
    seen = (document.unsqueeze(3) == document.unsqueeze(2)).tril()
    decay = (grown.unsqueeze(3) - grown.unsqueeze(2)).masked_fill(~seen.unsqueeze(-1), -torch.inf).exp()
    scores = torch.einsum("bkign,bkjgn->bkgij", c, b).unsqueeze(3)  # of all heads of a group
    weights = scores * decay.unflatten(-1, (groups, -1)).movedim((2, 3), (4, 5))
    by_group = taken.unflatten(3, (groups, -1))  # [batch, chunks, size, groups, heads of a group, head_dim]
    y = torch.einsum("bkgrij,bkjgrp->bkigrp", weights, by_group)

    # From chunk to chunk: what each leaves behind, and lets pass.
    left = (grown[:, :, -1:] - grown).masked_fill((document != document[:, :, -1:]).unsqueeze(-1), -torch.inf).exp()
    leaves = torch.einsum("bkjgrp,bkjgn->bkgrpn", by_group * left.view(*by_group.shape[:5], 1), b).flatten(2, 3)
    passes = grown[:, :, -1].masked_fill(document[:, :, -1:] > 0, -torch.inf).exp()[..., None, None]
    state = leaves.new_zeros(batch, *leaves.shape[2:]) if first is None else first.to(dtype)
    before = []
    for passed, left_behind in zip(passes.unbind(1), leaves.unbind(1), strict=True):
        before.append(state)
        state = passed * state + left_behind
    earlier = torch.stack(before, 1).unflatten(2, (groups, -1))
    reach = grown.masked_fill((document > 0).unsqueeze(-1), -torch.inf).exp()
    y = y + torch.einsum("bkign,bkgrpn->bkigrp", c, earlier) * reach.view(*by_group.shape[:5], 1)
    y = y.reshape(batch, seq + padding, heads, head_dim)[:, :seq] + d.unsqueeze(-1) * upcast_x
    return y.to(x.dtype), state


def ssd_reference(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, restarts: Tensor, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the same position by position."""
    heads = x.shape[2] // b.shape[2]
    b, c = (each.repeat_interleave(heads, 2) for each in (b, c))
    state = x.new_zeros(len(x), *x.shape[2:], b.shape[-1]) if first is None else first
    outs = []
    for t in range(x.shape[1]):
        decay = (delta[:, t] * a).exp().masked_fill(restarts[:, t : t + 1], 0)[..., None, None]
        state = decay * state + (delta[:, t].unsqueeze(-1) * x[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(2)
        outs.append((state * c[:, t].unsqueeze(2)).sum(-1) + d.unsqueeze(-1) * x[:, t])
    return torch.stack(outs, 1), state


def _chunks(x: Tensor, size: int, padding: int) -> Tensor:
    """Cut along the sequence. x: [batch, seq, ...]. Returns [batch, chunks, size, ...], zeros behind the end."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding)).unflatten(1, (-1, size))
