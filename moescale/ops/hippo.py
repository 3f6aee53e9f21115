"""HiPPO: memories that keep the history of a signal as its coefficients in an orthogonal basis.

A memory x of `size` numbers follows x' = A x + B u, driven by the signal u. The papers print the
signs differently: HiPPO and LSSL print +A and subtract it, S4 and the Legendre memory unit (LMU)
print it as it is here. Here A always stands in x' = A x + B u, and B always adds.

| measure | what is remembered | unit of time | age of `basis` |
|---|---|---|---|
| `legt` | the last window, all of it alike (Legendre, orthonormal) | a window | part of the window |
| `lmu` | the same in the LMU's scale, with Legendre polynomials as they are | a window | part of the window |
| `fourier` | the last window (cosines and sines); `size` is odd | a window | part of the window |
| `lagt` | everything, older values with a weight exp(-age) (Laguerre) | the decay's | time |
| `legs` | everything, all of it alike: x' = (A x + B u) / t | none | part of the time so far |

A window of theta samples is a step of 1/theta in `ops.discretize`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Measure = Literal["legs", "legt", "lmu", "lagt", "fourier"]


def hippo(measure: Measure, size: int) -> tuple[Tensor, Tensor]:
    """Return A [size, size] and B [size] of x' = A x + B u, in float64.

    Raises ValueError for an unknown measure, or an even size of `fourier`, whose last cosine would
    have no sine.
    Sources: Gu et al., HiPPO, 2020, appendix D; Voelker et al., LMU, 2019, equation 2.
    """
    n = torch.arange(size, dtype=torch.float64)
    row, column = n[:, None], n[None, :]
    scale = (2 * n + 1).sqrt()
    sign = 1 - 2 * ((row - column) % 2)  # (-1)^(n-k)
    if measure == "legs":
        below = scale[:, None] * scale[None, :] * (row > column)
        return -(below + torch.diag(n + 1)), scale
    if measure == "legt":
        return -scale[:, None] * scale[None, :] * torch.where(row >= column, 1.0, sign), scale
    if measure == "lmu":
        return -(2 * row + 1) * torch.where(row >= column, sign, 1.0), (2 * n + 1) * sign[:, 0]
    if measure == "lagt":
        return -torch.ones_like(row * column).tril(), torch.ones_like(n)
    if measure == "fourier":
        return _fourier(size)
    raise ValueError(f"measure={measure!r} is unknown: use one of {', '.join(get_args(Measure))}")


def _fourier(size: int) -> tuple[Tensor, Tensor]:
    """Return A and B for the basis 1, sqrt(2) cos(2 pi m r), sqrt(2) sin(2 pi m r) of the age r.

    The value that leaves the window is not known. At the ends of the window the series has the mean
    of the values that enter and leave, so that their difference is twice what the entering value is
    above the series.
    """
    if size % 2 == 0:
        raise ValueError(f"size={size} must be odd for fourier , as waves are pairs: use {size + 1}")
    ends = basis("fourier", size, torch.zeros((), dtype=torch.float64))
    a = -2 * ends[:, None] * ends[None, :]
    for wave in range(1, size // 2 + 1):
        cosine, sine = 2 * wave - 1, 2 * wave
        a[cosine, sine] -= 2 * math.pi * wave
        a[sine, cosine] += 2 * math.pi * wave
    return a, 2 * ends


def basis(measure: Measure, size: int, age: Tensor) -> Tensor:
    """Evaluate the functions whose sum, weighted with the memory, is the signal so long ago.

    age: [...], 0 = now, in the unit of the module's table. Returns [..., size], in the dtype of age.
    """
    if measure == "fourier":
        n = torch.arange(1, size // 2 + 1, dtype=age.dtype, device=age.device)
        angle = 2 * math.pi * age.unsqueeze(-1) * n
        waves = math.sqrt(2) * torch.stack((angle.cos(), angle.sin()), -1).flatten(-2)
        return torch.cat((torch.ones_like(age).unsqueeze(-1), waves), -1)
    if measure == "lagt":
        return laguerre(age, size)
    if measure == "lmu":
        return legendre(2 * age - 1, size)
    n = torch.arange(size, dtype=age.dtype, device=age.device)
    return (2 * n + 1).sqrt() * legendre(1 - 2 * age, size)


def reconstruct(measure: Measure, memory: Tensor, age: Tensor) -> Tensor:
    """Return the signal that a memory remembers, at some ages.

    memory: [..., size]. age: [points], as in `basis`. Returns [..., points].
    """
    return memory @ basis(measure, memory.shape[-1], age.to(memory.dtype)).T


def legendre(x: Tensor, size: int) -> Tensor:
    """Evaluate the Legendre polynomials of degrees 0 to size - 1. x: [...]. Returns [..., size]."""
    values = [torch.ones_like(x), x]
    for n in range(1, size - 1):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack(values[:size], -1)


def laguerre(x: Tensor, size: int) -> Tensor:
    """Evaluate the Laguerre polynomials of degrees 0 to size - 1. x: [...]. Returns [..., size]."""
    values = [torch.ones_like(x), 1 - x]
    for n in range(1, size - 1):
        values.append(((2 * n + 1 - x) * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack(values[:size], -1)


def legs_product(memory: Tensor) -> Tensor:
    """Multiply by the A of `legs` in a time linear in the size. memory: [..., size]; so is the result."""
    n = torch.arange(memory.shape[-1], dtype=memory.dtype, device=memory.device)
    scale = (2 * n + 1).sqrt()
    scaled = scale * memory
    return -(scale * (scaled.cumsum(-1) - scaled) + (n + 1) * memory)


def legs_solve(right: Tensor, step: float) -> Tensor:
    """Solve (I - step A) x = right for the A of `legs` in a time linear in the size.

    right: [..., size]. step: not negative. Returns x, of the same shape.
    """
    n = torch.arange(right.shape[-1], dtype=right.dtype, device=right.device)
    scale, diagonal = (2 * n + 1).sqrt(), 1 + step * (n + 1)
    # With s_n = the sum of scale_k x_k over k < n, row n reads diagonal_n x_n + step scale_n s_n =
    # right_n, so that s_(n+1) = keep_n s_n + scale_n right_n / diagonal_n.
    sums = _linear_scan(1 - step * scale**2 / diagonal, scale * right / diagonal)
    return (right - step * scale * F.pad(sums[..., :-1], (1, 0))) / diagonal


def _linear_scan(keep: Tensor, add: Tensor) -> Tensor:
    """Compute s_n = keep_n s_(n-1) + add_n, where s_(-1) = 0, by joining neighbours to pairs.

    It takes a time linear in the size, and a number of operations that grows with its logarithm.
    keep: [size]. add: [..., size]. Returns s, like add.
    """
    size = len(keep)
    if size == 1:
        return add
    if size % 2:
        keep, add = F.pad(keep, (0, 1)), F.pad(add, (0, 1))
    first_keep, second_keep = keep[0::2], keep[1::2]
    first_add, second_add = add[..., 0::2], add[..., 1::2]
    second = _linear_scan(first_keep * second_keep, second_keep * first_add + second_add)
    first = first_keep * F.pad(second[..., :-1], (1, 0)) + first_add
    return torch.stack((first, second), -1).flatten(-2)[..., :size]


def legs_step(memory: Tensor, u: Tensor, step: float, alpha: float = 0.5) -> Tensor:
    """Take one value into a `legs` memory, in a time linear in its size.

    The generalised bilinear transform of x' = (A x + B u) / t. memory: [..., size]. u: [...].
    step: (t - t0) / t, where the memory stands at t0 and the value at t; 1/k for the k-th of equally
    spaced values, counted from 1. alpha: 0 = forward Euler, 1/2 = bilinear, 1 = backward Euler.
    Returns the memory at t. Before k = size / 2 forward Euler amplifies what it holds.
    """
    n = torch.arange(memory.shape[-1], dtype=memory.dtype, device=memory.device)
    right = memory + step * (2 * n + 1).sqrt() * u.unsqueeze(-1)
    if alpha < 1:
        right = right + (1 - alpha) * step * legs_product(memory)
    return legs_solve(right, alpha * step) if alpha else right
