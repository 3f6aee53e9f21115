"""The selective scan: a linear recurrence whose step, input and output depend on the position (Mamba, alg. 2).

Backends, tested against each other: Triton on a GPU, blocks of positions elsewhere, and the plain loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moescale.ops.device import triton_runs


def selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, restarts: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of each channel in at least float32.

    h_t = exp(delta_t a) h_(t-1) + delta_t b_t u_t;  y_t = c_t h_t + d u_t
    u, delta: [batch, seq, channels]. a: [channels, d_state], below zero. b, c: [batch, seq, d_state]. d: [channels].
    restarts: [batch, seq] bool; there h starts from zero. first: [batch, channels, d_state], the state before the
    sequence; None = zeros. Returns y, like u, and the last state, like first, in at least float32.
    """
    if triton_runs(u):
        from moescale.ops.scan_triton import selective_scan as kernel

        return kernel(u, delta, a, b, c, d, restarts, first)
    from moescale.ops.scan_blocks import selective_scan as blocks

    return blocks(u, delta, a, b, c, d, restarts, first)


def selective_scan_reference(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, restarts: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the same position by position, by autograd alone."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    upcast_u, delta, a, b, c, d = (x.to(dtype) for x in (u, delta, a, b, c, d))
    state = a.new_zeros(len(u), *a.shape) if first is None else first.to(dtype)
    outs = []
    # Cut in one go, so that backward does not make a gradient of the whole length for each position.
    parts = (x.unbind(1) for x in (delta, upcast_u, b, c))
    for t, (delta_t, u_t, b_t, c_t) in enumerate(zip(*parts, strict=True)):
        decay = (delta_t.unsqueeze(-1) * a).exp()
        if restarts is not None:
            decay = decay.masked_fill(restarts[:, t].view(-1, 1, 1), 0)
        state = decay * state + (delta_t * u_t).unsqueeze(-1) * b_t.unsqueeze(1)
        outs.append((state * c_t.unsqueeze(1)).sum(-1) + d * u_t)
    return torch.stack(outs, 1).to(u.dtype) if outs else u, state
