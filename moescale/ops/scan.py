"""The selective scan: a linear recurrence whose step, input and output depend on the position (Mamba, alg. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from moescale.ops.device import triton_runs


def selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Run the recurrence of each channel in at least float32.

    h_t = exp(delta_t a) h_(t-1) + delta_t b_t u_t;  y_t = c_t h_t + d u_t
    u, delta: [batch, seq, channels]. a: [channels, d_state], below zero. b, c: [batch, seq, d_state]. d: [channels].
    positions: [batch, seq] int64; at 0 a document begins, and h starts from zero. -> y, like u
    """
    if triton_runs(u):
        from moescale.ops.scan_triton import selective_scan as kernel

        return kernel(u, delta, a, b, c, d, positions)
    return selective_scan_reference(u, delta, a, b, c, d, positions)


def selective_scan_reference(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Compute the same position by position, by autograd alone."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    upcast_u, delta, a, b, c, d = (x.to(dtype) for x in (u, delta, a, b, c, d))
    state, outs = a.new_zeros(len(u), *a.shape), []  # [batch, channels, d_state]
    for t in range(u.shape[1]):
        decay = (delta[:, t].unsqueeze(-1) * a).exp()
        if positions is not None:
            decay = decay.masked_fill((positions[:, t] == 0).view(-1, 1, 1), 0)
        state = decay * state + (delta[:, t] * upcast_u[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(1)
        outs.append((state * c[:, t].unsqueeze(1)).sum(-1) + d * upcast_u[:, t])
    return torch.stack(outs, 1).to(u.dtype) if outs else u
