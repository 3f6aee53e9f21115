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

Initialization = Literal["legs", "lin", "inv", "real"]
ELEMENTS = 1 << 19  # of one frequency and state each, as many as are computed together: they fit into a cache


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
    """Compute the kernel C A_bar^k B_bar from its spectrum, four sums over 1 / (g - eigenvalue) (S4, algorithm 1).

    eigenvalues, p, b, c, step: as in `discretize_dplr`, of whose precision the sums are. a_bar: its dense A_bar, by
    whose power the spectrum of an infinite kernel becomes that of `length` taps. Returns [channels, outputs, length].
    """
    # C (I - A_bar^size) gives the spectrum of the first `size` taps alone.
    size, outputs = fast_length(max(length, 2)), c.shape[1]
    parts = 2 * _parts(c.conj()).to(a_bar.dtype)
    parts = parts - parts @ torch.linalg.matrix_power(a_bar, size)
    c = torch.view_as_complex(parts.unflatten(2, (-1, 2)) / 2).conj().to(c.dtype)
    # At the root w = exp(-i angle), 2 (1 - w) - (1 + w) step eigenvalue = 2 exp(-i angle / 2) (i sine - cosine step
    # eigenvalue), so that nothing is infinite at w = -1.
    angle = math.pi * torch.arange(size // 2 + 1, dtype=torch.float64, device=c.device) / size
    cosine, sine = angle.cos().to(step.dtype), (2 * angle.sin()).to(step.dtype)
    numerators = torch.cat((c * b.unsqueeze(1), c * p.unsqueeze(1), torch.stack((p.conj() * b, p.conj() * p), 1)), 1)
    scale = step.unsqueeze(1)
    sums = cauchy_sums(numerators, scale * eigenvalues, cosine, sine)  # [channels, numerators, frequencies]
    c_b, c_p, (p_b, p_p) = sums[:, :outputs], sums[:, outputs:-2], sums[:, -2:].unbind(1)
    correction = scale * cosine * p_b / (1 + scale * cosine * p_p)
    phase = torch.polar(torch.ones_like(angle), angle).to(c.dtype)
    spectrum = scale.unsqueeze(2) * phase * (c_b - c_p * correction.unsqueeze(1))
    return torch.fft.irfft(spectrum, n=size)[..., :length]


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


def cauchy_sums(numerators: Tensor, eigenvalues: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Sum v / (i sine - cosine eigenvalue) over eigenvalues and their conjugates, whose numerators are conjugates, too.

    numerators: [channels, numerators, d_state / 2] complex. eigenvalues: [channels, d_state / 2] complex, real parts
    below zero. cosine, sine: [frequencies] real. Returns [channels, numerators, frequencies] complex. Memory beside
    that is bounded: terms are computed again in backward.
    """
    # A pair adds up to (i sine r - cosine q) / (cosine^2 |eigenvalue|^2 - sine^2 - 2 i sine cosine real part) with
    # real r and q, which halves the work.
    r = 2 * numerators.real
    q = 2 * (numerators * eigenvalues.conj().unsqueeze(1)).real
    # The last product brings rows of r and q to both parts of the denominator's inverse.
    both = torch.cat((r, q), 1).transpose(1, 2)  # [channels, d_state / 2, 2 * numerators]
    alpha, beta = _Inverses.apply(both, eigenvalues.abs(), eigenvalues.real, cosine, sine)
    alpha_r, alpha_q = alpha.transpose(1, 2).chunk(2, 1)
    beta_r, beta_q = beta.transpose(1, 2).chunk(2, 1)
    return torch.complex(sine * beta_r - cosine * alpha_q, sine * alpha_r + cosine * beta_q)


class _Inverses(torch.autograd.Function):
    """Multiply real and negated imaginary parts of 1 / denominator by columns, a few channels at a time.

    columns: [channels, states, columns]. Returns two [channels, frequencies, columns].
    """

    @staticmethod
    def forward(
        ctx: Any, columns: Tensor, magnitude: Tensor, real: Tensor, cosine: Tensor, sine: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(columns, magnitude, real, cosine, sine)
        products = [torch.stack([part @ columns[some] for part in _inverse(magnitude[some], real[some], cosine, sine)])
                    for some in _portions(columns, cosine)]
        alpha, beta = torch.cat(products, 1)
        return alpha, beta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_alpha: Tensor, grad_beta: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        columns, magnitude, real, cosine, sine = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (columns, magnitude, real)]
        for some in _portions(columns, cosine):
            alpha, beta = _inverse(magnitude[some], real[some], cosine, sine)
            grads[0][some] = alpha.mT @ grad_alpha[some] + beta.mT @ grad_beta[some]
            # With z = alpha - i beta = 1 / d: dz = -z^2 dd.
            to_alpha, to_beta = grad_alpha[some] @ columns[some].mT, grad_beta[some] @ columns[some].mT
            square, cross = alpha.square().addcmul_(beta, beta, value=-1), alpha.mul_(beta).mul_(2)
            grad_real_part = (square * to_alpha).addcmul_(cross, to_beta).neg_()
            grad_imaginary_part = square.mul_(to_beta).addcmul_(cross, to_alpha, value=-1)
            grads[1][some] = 2 * magnitude[some] * (cosine.square() @ grad_real_part)
            grads[2][some] = -2 * ((sine * cosine) @ grad_imaginary_part)
        return grads[0], grads[1], grads[2], None, None


def _inverse(magnitude: Tensor, real: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Compute alpha and beta, 1 / denominator = alpha - i beta. Returns two [channels, frequencies, states]."""
    sine, cosine = sine[:, None], cosine[:, None]
    scaled = cosine * magnitude.unsqueeze(1)
    real_part = (scaled - sine).mul_(scaled.add_(sine))
    imaginary_part = (-2 * sine * cosine) * real.unsqueeze(1)
    norm = real_part.square().addcmul_(imaginary_part, imaginary_part)
    return real_part.div_(norm), imaginary_part.div_(norm)


def _portions(columns: Tensor, cosine: Tensor) -> list[slice]:
    """Cut the channels into portions that are computed together."""
    channels, states = columns.shape[:2]
    each = max(1, ELEMENTS // (states * len(cosine)))
    return [slice(first, first + each) for first in range(0, channels, each)]


def _parts(x: Tensor) -> Tensor:
    """List real and imaginary parts in turn. x: [..., states] complex. Returns [..., 2 * states] real."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2)


def _dense(diagonal: Tensor) -> Tensor:
    """Write complex diagonal matrices as real ones. diagonal: [channels, states]. Returns twice as many rows."""
    real, imaginary = torch.diag_embed(diagonal.real), torch.diag_embed(diagonal.imag)
    rows = torch.stack((torch.stack((real, -imaginary), -1), torch.stack((imaginary, real), -1)), -3)
    return rows.flatten(3, 4).flatten(1, 2)
