"""The selective scan as Triton kernels: a parallel scan within a chunk of positions, chunk after chunk.

Of the states only one per chunk lies in memory, that at its beginning; backward computes the others again from it. A
pair (x, y) stands for h -> x h + y, and pairs compose associatively. The gradients of b and c, sums over channels, are
first summed per block of channels, without atomics.

Letters: L positions, T of them per chunk; C channels, BLOCK of them per program; N d_state, loaded as STATES.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, restarts: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan as `ops.scan.selective_scan` does; bfloat16, float16 or float32, states and sums in float32."""
    return _Scan.apply(u, delta, a, b, c, d, None if restarts is None else restarts.to(torch.uint8), first)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, restarts: Tensor | None,
        first: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        u, delta, a, b, c, d = (x.contiguous() for x in (u, delta, a, b, c, d))
        restarts, first = (None if x is None else x.contiguous() for x in (restarts, first))
        options, out = _options(u, a, restarts), torch.empty_like(u)
        (batch, seq, channels), chunk = u.shape, options["T"]
        states = torch.empty(
            batch, triton.cdiv(seq, chunk), *a.shape, dtype=torch.float32, device=u.device
        )  # before each chunk
        last = torch.zeros(batch, *a.shape, dtype=torch.float32, device=u.device)
        if u.numel():
            _forward[(triton.cdiv(channels, options["BLOCK"]), batch)](
                u, delta, a, b, c, d, restarts, first, out, states, last, seq, channels, a.shape[1],
                **options, FIRST=first is not None,
            )
        ctx.save_for_backward(u, delta, a, b, c, d, restarts, states)
        ctx.first_dtype = None if first is None else first.dtype
        return out, last

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, a, b, c, d, restarts, states = ctx.saved_tensors
        options, (batch, seq, channels) = _options(u, a, restarts), u.shape
        blocks = triton.cdiv(channels, options["BLOCK"])
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
        grad_a = torch.zeros(batch, *a.shape, dtype=torch.float32, device=u.device)
        grad_d = torch.zeros(batch, channels, dtype=torch.float32, device=u.device)
        grad_first = torch.zeros(batch, *a.shape, dtype=torch.float32, device=u.device)
        grad_b, grad_c = (torch.zeros(blocks, *b.shape, dtype=torch.float32, device=u.device) for _ in range(2))
        if u.numel():
            _backward[(blocks, batch)](
                u, delta, a, b, c, d, restarts, states, grad.contiguous(), grad_last.contiguous(), grad_u, grad_delta,
                grad_a, grad_b, grad_c, grad_d, grad_first, seq, channels, a.shape[1], **options,
            )
        return (
            grad_u, grad_delta, grad_a.sum(0).to(a.dtype), grad_b.sum(0).to(b.dtype), grad_c.sum(0).to(c.dtype),
            grad_d.sum(0).to(d.dtype), None, None if ctx.first_dtype is None else grad_first.to(ctx.first_dtype),
        )


def _options(u: Tensor, a: Tensor, restarts: Tensor | None) -> dict[str, Any]:
    states = triton.next_power_of_2(a.shape[1])
    return {"T": 8, "BLOCK": max(1, 128 // states), "STATES": states, "DOCUMENTS": restarts is not None,
            "num_warps": max(1, states // 64), "num_stages": 1}  # one warp alone scans without a barrier


@triton.jit
def _compose(x1, y1, x2, y2):
    """Compose two steps, the second after the first."""
    return x2 * x1, x2 * y1 + y2


@triton.jit
def _steps(U, Delta, B, Restarts, t, L, batch, a, channel, C, state, N, DOCUMENTS: tl.constexpr):
    """Load the steps at positions t, which beyond the sequence change nothing.

    -> decay, input: [T, BLOCK, STATES]; u, delta: [T, BLOCK]; b: [T, STATES]; all float32
    """
    here = (t >= 0) & (t < L)
    row = batch * L + t
    mask = here[:, None] & (channel < C)[None, :]
    u = tl.load(U + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    delta = tl.load(Delta + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(B + row[:, None] * N + state[None, :], mask=here[:, None] & (state < N)[None, :], other=0.0)
    decay = tl.exp(delta[:, :, None] * a[None, :, :])
    if DOCUMENTS:
        begins = tl.load(Restarts + row, mask=here, other=0) != 0
        decay = tl.where(begins[:, None, None], 0.0, decay)
    return decay, (delta * u)[:, :, None] * b.to(tl.float32)[:, None, :], u, delta, b.to(tl.float32)


@triton.jit
def _forward(
    U, Delta, A, B, Read, D, Restarts, First, Out, States, Last, L, C, N, T: tl.constexpr, BLOCK: tl.constexpr,
    STATES: tl.constexpr, DOCUMENTS: tl.constexpr, FIRST: tl.constexpr,
):
    """Scan some channels, chunk after chunk."""
    batch, chunks = tl.program_id(1).to(tl.int64), tl.cdiv(L, T)
    channel, state, step = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES), tl.arange(0, T)
    offset_a, inside = channel[:, None] * N + state[None, :], (channel < C)[:, None] & (state < N)[None, :]
    a = tl.load(A + offset_a, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(D + channel, mask=channel < C, other=0.0).to(tl.float32)
    h = tl.zeros((BLOCK, STATES), tl.float32)
    if FIRST:
        h += tl.load(First + batch * C * N + offset_a, mask=inside, other=0.0).to(tl.float32)
    for chunk in range(chunks):
        # Keep the state before the chunk, then scan its steps; the first one takes that state along.
        tl.store(States + (batch * chunks + chunk) * C * N + offset_a, h, mask=inside)
        t = chunk * T + step
        decay, taken, u, _, _ = _steps(U, Delta, B, Restarts, t, L, batch, a, channel, C, state, N, DOCUMENTS)
        taken += tl.where((step == 0)[:, None, None], decay * h[None, :, :], 0.0)
        _, states = tl.associative_scan((decay, taken), 0, _compose)
        # Read the states out.
        row = batch * L + t
        c = tl.load(Read + row[:, None] * N + state[None, :], mask=(t < L)[:, None] & (state < N)[None, :], other=0.0)
        y = tl.sum(states * c.to(tl.float32)[:, None, :], 2) + d[None, :] * u
        tl.store(Out + row[:, None] * C + channel[None, :], y.to(Out.dtype.element_ty),
                 mask=(t < L)[:, None] & (channel < C)[None, :])
        h = tl.sum(tl.where((step == T - 1)[:, None, None], states, 0.0), 0)
    tl.store(Last + batch * C * N + offset_a, h, mask=inside)


@triton.jit
def _backward(
    U, Delta, A, B, Read, D, Restarts, States, Grad, GradLast, GradU, GradDelta, GradA, GradB, GradC, GradD, GradFirst,
    L, C, N, T: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, DOCUMENTS: tl.constexpr,
):
    """Compute all gradients of some channels, from the last chunk to the first.

    grad_h_t = c_t grad_t + decay_(t+1) grad_h_(t+1): a scan in the other direction.
    """
    batch, chunks = tl.program_id(1).to(tl.int64), tl.cdiv(L, T)
    channel, state, step = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES), tl.arange(0, T)
    offset_a, inside = channel[:, None] * N + state[None, :], (channel < C)[:, None] & (state < N)[None, :]
    a = tl.load(A + offset_a, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(D + channel, mask=channel < C, other=0.0).to(tl.float32)
    offset_block = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + batch) * L
    grad_a = tl.zeros((BLOCK, STATES), tl.float32)
    grad_d = tl.zeros((BLOCK,), tl.float32)
    # Decay times gradient of the first state of the chunk behind; positions beyond the sequence pass it on.
    carry = tl.load(GradLast + batch * C * N + offset_a, mask=inside, other=0.0).to(tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        t = chunk * T + step
        first = tl.load(States + (batch * chunks + chunk) * C * N + offset_a, mask=inside, other=0.0)
        # States before each step: a scan over the steps before, where the first one is the state before the chunk.
        decay, taken, _, _, _ = _steps(U, Delta, B, Restarts, t - 1, L, batch, a, channel, C, state, N, DOCUMENTS)
        taken = tl.where((step == 0)[:, None, None], first[None, :, :], taken)
        _, before = tl.associative_scan((decay, taken), 0, _compose)
        decay, taken, u, delta, b = _steps(
            U, Delta, B, Restarts, t, L, batch, a, channel, C, state, N, DOCUMENTS
        )
        # The gradient of c.
        row, mask = batch * L + t, (t < L)[:, None] & (channel < C)[None, :]
        offset_b = row[:, None] * N + state[None, :]
        mask_b = (t < L)[:, None] & (state < N)[None, :]
        grad = tl.load(Grad + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        c = tl.load(Read + offset_b, mask=mask_b, other=0.0).to(tl.float32)
        states = decay * before + taken
        offset_partial = (offset_block + t)[:, None] * N + state[None, :]
        tl.store(GradC + offset_partial, tl.sum(grad[:, :, None] * states, 1), mask=mask_b)
        # The gradients of the states: the scan from the end, which takes the chunk behind along.
        grad_decay = before * decay
        after, _, _, _, _ = _steps(U, Delta, B, Restarts, t + 1, L, batch, a, channel, C, state, N, DOCUMENTS)
        given = grad[:, :, None] * c[:, None, :] + tl.where((step == T - 1)[:, None, None], carry[None, :, :], 0.0)
        _, grad_h = tl.associative_scan((after, given), 0, _compose, reverse=True)
        carry = tl.sum(tl.where((step == 0)[:, None, None], decay * grad_h, 0.0), 0)
        # From there to a, b, delta, u and d.
        grad_decay *= grad_h  # the gradient of delta a
        grad_a += tl.sum(grad_decay * delta[:, :, None], 0)
        grad_input = tl.sum(grad_h * b[:, None, :], 2)  # the gradient of delta u
        tl.store(GradB + offset_partial, tl.sum(grad_h * (delta * u)[:, :, None], 1), mask=mask_b)
        offset_u = row[:, None] * C + channel[None, :]
        grad_delta = tl.sum(grad_decay * a[None, :, :], 2) + grad_input * u
        tl.store(GradDelta + offset_u, grad_delta.to(GradDelta.dtype.element_ty), mask=mask)
        grad_u = grad_input * delta + d[None, :] * grad
        tl.store(GradU + offset_u, grad_u.to(GradU.dtype.element_ty), mask=mask)
        grad_d += tl.sum(grad * u, 0)
    tl.store(GradA + batch * C * N + offset_a, grad_a, mask=inside)
    tl.store(GradD + batch * C + channel, grad_d, mask=channel < C)
    tl.store(GradFirst + batch * C * N + offset_a, carry, mask=inside)
