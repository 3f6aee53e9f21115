"""S4's continuous systems: normal plus low rank (DPLR) with the Cauchy kernel, and diagonal (S4D).

A real system of d_state states has complex eigenvalues in conjugate pairs, of which one each is kept: `eigenvalues`,
`p`, `b` and `c` have d_state / 2 complex numbers, and outputs are twice the real part. In DPLR form A is
diag(eigenvalues) - P P*, with the conjugate transpose: its real parts stay below zero whatever P is, which is not so
with two separate vectors (Goel et al., 2022). Real dense systems order states as real and imaginary parts in turn.

Sources: Gu, Goel and Re, S4, 2022; Gu et al., S4D, 2022.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moescale.ops.convolution import fast_length
from moescale.ops.discretize import discretize
from moescale.ops.hippo import hippo
from moescale.ops.state_space import Powers, krylov_kernel, rows_after

Initialization = Literal["legs", "lin", "inv", "real"]


def dplr_legs(d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bring HiPPO-LegS into DPLR form (S4, theorem 1). Returns eigenvalues, P and B [d_state / 2] in complex128."""
    a, b = hippo("legs", d_state)
    p = (torch.arange(d_state, dtype=torch.float64) + 0.5).sqrt()
    # What is left without the low rank is -1/2 on the diagonal and skew-symmetric: normal, with real parts of -1/2.
    skew = a + torch.outer(p, p) + torch.eye(d_state, dtype=torch.float64) / 2
    frequency, vectors = torch.linalg.eigh(-1j * skew)
    upper = frequency > 0
    basis = vectors[:, upper].mH
    return torch.complex(torch.full((d_state // 2,), -0.5, dtype=torch.float64), frequency[upper]), \
        basis @ p.to(basis.dtype), basis @ b.to(basis.dtype)


def diagonal_eigenvalues(initialization: Initialization, d_state: int) -> Tensor:
    """Return the eigenvalues of S4D's initializations [d_state / 2] in complex128 (S4D, section 4)."""
    n = torch.arange(d_state // 2, dtype=torch.float64)
    half = torch.full_like(n, -0.5)
    if initialization == "legs":
        return dplr_legs(d_state)[0]
    if initialization == "lin":
        return torch.complex(half, math.pi * n)
    if initialization == "inv":
        return torch.complex(half, d_state / math.pi * (d_state / (2 * n + 1) - 1))
    if initialization == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n))
    raise ValueError(f"initialization={initialization!r} is unknown: use one of {', '.join(get_args(Initialization))}")


def first_values(table: str, d_state: int) -> Tensor:
    """Return what S4's weights start with in each channel, in float64.

    table: `INITIALIZATION_log_decay` or `INITIALIZATION_frequency`, [d_state / 2]; `p` or `b` of HiPPO-LegS, or `one`,
    [d_state / 2, 2] for real and imaginary parts.
    """
    if table == "one":
        return torch.view_as_real(torch.ones(d_state // 2, dtype=torch.complex128))
    if table in ("p", "b"):
        return torch.view_as_real(dplr_legs(d_state)[1 if table == "p" else 2].resolve_conj())
    initialization, _, part = table.partition("_")
    eigenvalues = diagonal_eigenvalues(cast(Initialization, initialization), d_state)
    return eigenvalues.imag if part == "frequency" else (-eigenvalues.real).log()


def discretize_diagonal(
    eigenvalues: Tensor, b: Tensor, step: Tensor, method: Literal["zero_order_hold", "bilinear"]
) -> tuple[Tensor, Tensor]:
    """Return the diagonal of A_bar, and B_bar.

    eigenvalues, b: [channels, d_state / 2] complex. step: [channels]. Returns two like b in complex128: what is
    applied thousands of times must not be rounded first.
    """
    eigenvalues, b = eigenvalues.to(torch.complex128), b.to(torch.complex128)
    scaled = step.double().unsqueeze(1) * eigenvalues
    if method == "zero_order_hold":
        return scaled.exp(), torch.expm1(scaled) / eigenvalues * b
    return (1 + scaled / 2) / (1 - scaled / 2), step.unsqueeze(1) / (1 - scaled / 2) * b


def discretize_dplr(
    eigenvalues: Tensor, p: Tensor, b: Tensor, c: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the dense real system after the bilinear transform, in float64.

    eigenvalues, p, b: [channels, d_state / 2] complex. c: [channels, outputs, d_state / 2]. step: [channels].
    Returns A_bar [channels, d_state, d_state], B_bar [channels, d_state] and C [channels, outputs, d_state].
    """
    eigenvalues, p, b, c = (x.to(torch.complex128) for x in (eigenvalues, p, b, c))
    step = step.double().unsqueeze(1)
    # Woodbury's identity: the inverse of I - step / 2 A is diagonal without P, and of rank one beside that.
    inverse = 1 / (1 - step / 2 * eigenvalues)
    column, row = _parts(inverse * p), 2 * _parts(inverse.conj() * p)
    share = 2 / step + (row * _parts(p)).sum(1, keepdim=True)
    # A_bar = 2 (I - step / 2 A)^-1 - I.
    a_bar = _dense(2 * inverse - 1) - (2 / share * column).unsqueeze(2) * row.unsqueeze(1)
    b_bar = step * (_parts(inverse * b) - column / share * (row * _parts(b)).sum(1, keepdim=True))
    return a_bar, b_bar, 2 * _parts(c.conj())


def dplr_kernel(
    eigenvalues: Tensor, p: Tensor, b: Tensor, c: Tensor, step: Tensor, length: int, a_bar: Tensor
) -> Tensor:
    """Compute the kernel C A_bar^k B_bar from its spectrum, four Cauchy sums over eigenvalues (S4, algorithm 1).

    eigenvalues, p, b, c, step: as in `discretize_dplr`. a_bar: its dense A_bar, by whose power the spectrum of an
    infinite kernel becomes that of `length` taps. Returns [channels, outputs, length] in float64.
    """
    eigenvalues, p, b, c = (x.to(torch.complex128) for x in (eigenvalues, p, b, c))
    scale = step.double().unsqueeze(1)
    # C (I - A_bar^size) gives the spectrum of the first `size` taps alone.
    size, outputs = 2 * fast_length(-(-length // 2)), c.shape[1]
    parts = _parts(c.conj())
    parts = parts - rows_after(parts, a_bar, size, step.dtype)
    c = torch.view_as_complex(parts.unflatten(2, (-1, 2))).conj()
    numerators = torch.cat((c * b.unsqueeze(1), c * p.unsqueeze(1), torch.stack((p.conj() * b, p.conj() * p), 1)), 1)
    sums = cauchy_sums(scale.unsqueeze(2) * numerators, scale * eigenvalues, size)
    c_b, c_p, low_rank = sums.split((outputs, outputs, 2), 1)
    p_b, p_p = low_rank.unbind(1)
    # Woodbury's identity puts P in. All sums are over (1 + w) / 2, so that nothing is infinite at w = -1.
    angle = -2 * math.pi * torch.arange(size // 2 + 1, dtype=torch.float64, device=c.device) / size
    middle = (1 + torch.polar(torch.ones_like(angle), angle)) / 2
    kernel = torch.fft.irfft(c_b - c_p * (middle * p_b / (1 + middle * p_p)).unsqueeze(1), n=size)
    return kernel if size == length else kernel[..., :length]


def cauchy_sums(numerators: Tensor, eigenvalues: Tensor, size: int) -> Tensor:
    """Sum v / (1 - w - (1 + w) eigenvalue / 2) over eigenvalues and their conjugates, at the roots of unity w.

    At the roots a term is the transform of a geometric series, so that all sums are one product of matrices and one
    transform: 1 / (1 - ratio w) is the sum of ratio^k w^k, which comes back after `size` terms.

    numerators: [channels, numerators, d_state / 2] complex, conjugates for conjugates. eigenvalues: [channels, d_state
    / 2] complex, real parts below zero. Returns [channels, numerators, size / 2 + 1], for w = exp(-2 pi i k / size).
    """
    ratio = (1 + eigenvalues / 2) / (1 - eigenvalues / 2)
    ones = torch.ones_like(ratio)
    wrapped = Powers.of(ratio).advance(ones.unsqueeze(0), size)[0]
    starts = numerators / ((1 - eigenvalues / 2) * (1 - wrapped)).unsqueeze(1)
    sums: Tensor = _Spectrum.apply(krylov_kernel(ratio, ones, starts, size))
    return sums


class _Spectrum(torch.autograd.Function):
    """Transform real signals of even length; backward is a real one too, where torch's goes over all frequencies."""

    @staticmethod
    def forward(ctx: Any, signal: Tensor) -> Tensor:
        ctx.size = signal.shape[-1]
        return torch.fft.rfft(signal)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # The inverse transform adds a conjugate for each frequency but the first and the last.
        halves = 0.5 * grad
        halves[..., 0], halves[..., -1] = grad[..., 0], grad[..., -1]
        return torch.fft.irfft(halves, n=ctx.size, norm="forward")


def dplr_kernel_reference(
    eigenvalues: Tensor, p: Tensor, b: Tensor, c: Tensor, step: Tensor, length: int
) -> Tensor:
    """Compute the same tap by tap with dense matrices of all eigenvalues, by autograd alone, in complex128."""
    eigenvalues, p, b, c = (torch.cat((x, x.conj()), -1).to(torch.complex128) for x in (eigenvalues, p, b, c))
    a = torch.diag_embed(eigenvalues) - p.unsqueeze(2) * p.conj().unsqueeze(1)
    a_bar, x = discretize(a, b, step.to(a.dtype))
    taps = []
    for _ in range(length):
        taps.append((c @ x.unsqueeze(2)).squeeze(2).real)
        x = (a_bar @ x.unsqueeze(2)).squeeze(2)
    return torch.stack(taps, -1)


def dplr_step(
    u: Tensor, eigenvalues: Tensor, p: Tensor, b: Tensor, c: Tensor, step: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Go on by one position in a time linear in d_state, by Woodbury's identity (S4, appendix C.2).

    u: [batch, channels]. state: [batch, channels, d_state], real and imaginary parts in turn. Others as in
    `discretize_dplr`. Returns outputs [batch, channels, outputs] like u and the state that follows like state.
    """
    eigenvalues, p, b, c = (x.to(torch.complex128) for x in (eigenvalues, p, b, c))
    scale = step.double().unsqueeze(1)
    x = torch.view_as_complex(state.double().unflatten(-1, (-1, 2)).contiguous())
    # Forward half of the bilinear step: (I + step / 2 A) x + step B u.
    low_rank = 2 * (p.conj() * x).real.sum(-1, keepdim=True) * p
    x = x + scale / 2 * (eigenvalues * x - low_rank) + scale * b * u.double().unsqueeze(-1)
    # Backward half: solve with I - step / 2 A, a diagonal plus P P*.
    diagonal = 1 / (1 - scale / 2 * eigenvalues)
    x, moved = diagonal * x, diagonal * p
    share = (p.conj() * x).real.sum(-1, keepdim=True) / (1 / scale + (p.conj() * moved).real.sum(-1, keepdim=True))
    x = x - share * moved
    out = 2 * (c * x.unsqueeze(2)).real.sum(-1)
    return out.to(u.dtype), torch.view_as_real(x).flatten(-2).to(state.dtype)


def _parts(x: Tensor) -> Tensor:
    """List real and imaginary parts in turn. x: [..., states] complex. Returns [..., 2 * states] real."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2)


def _dense(diagonal: Tensor) -> Tensor:
    """Write complex diagonal matrices as real ones. diagonal: [channels, states]. Returns twice as many rows."""
    real, imaginary = torch.diag_embed(diagonal.real), torch.diag_embed(diagonal.imag)
    rows = torch.stack((torch.stack((real, -imaginary), -1), torch.stack((imaginary, real), -1)), -3)
    return rows.flatten(3, 4).flatten(1, 2)
