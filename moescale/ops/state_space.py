"""Linear systems that do not change over time: x_t = A x_(t-1) + B u_t, y_t = C x_t, of documents in sequences.

Outputs come by FFT with the kernel (C B, C A B, C A^2 B, ...) (LSSL, section 3). Powers of A are applied by doubling,
a few columns at a time: no tensor has d_state numbers for each position, unless the outputs do.

Three letters as in the papers. A is dense, [channels, d_state, d_state], or diagonal, [channels, d_state]. If it is
complex, each of its states stands for itself and its conjugate, so that outputs are twice the real part. One system for
all channels has 1 instead of channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.convolution import causal_convolution


def linear_system(
    u: Tensor, restarts: Tensor | None, a: Tensor, b: Tensor, c: Tensor | None, state: Tensor | None = None,
    kernel: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the outputs of each channel's system, and its last state.

    u: [batch, seq, channels]. restarts: [batch, seq] bool, before which the state is zero; None = nowhere.
    a: discrete, [channels, d_state, d_state], or its diagonal [channels, d_state]. b: [channels, d_state].
    c: [channels, outputs, d_state]; None if the outputs are the state itself, which is then real.
    state: [batch, channels, d_state], from before the first position; None if it is zero and the last is not wanted.
    kernel: [channels, outputs, taps] where it is known, taps at least the longest document.

    Returns outputs [batch, seq, channels, outputs] in the dtype of u, and the last state like state. Sums over
    positions and states are in at least float32, powers of A in float64: rounded ones drift with the length.
    """
    seq = u.shape[1]
    if state is not None and seq == 1:
        return _step(u, restarts, a, b, c, state)
    if kernel is None:
        kernel = krylov_kernel(a, b, c, seq, _sum_dtype(u))
    out = causal_convolution(u, kernel, restarts)
    if state is None:
        return out, None
    powers = Powers.of(a)
    free = _free_response(powers, c, state, seq, _sum_dtype(u)).to(u.dtype)
    if restarts is not None:
        free = free.masked_fill((restarts.cumsum(1) > 0)[:, :, None, None], 0)
    return out + free, _last_state(u, restarts, powers, b, state)


def linear_system_reference(
    u: Tensor, restarts: Tensor | None, a: Tensor, b: Tensor, c: Tensor | None, state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the same position by position, by autograd alone."""
    outs = []
    for t in range(u.shape[1]):
        out, state = _step(u[:, t : t + 1], None if restarts is None else restarts[:, t : t + 1], a, b, c, state)
        outs.append(out)
    return torch.cat(outs, 1), state


def krylov_kernel(a: Tensor, b: Tensor, c: Tensor | None, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Compute C A^k B for k below length, as products of C A^(steps j) and A^i B, of which there are few.

    a, b, c: as in `linear_system`. dtype: of the last product. Returns [channels, outputs, length].
    """
    powers = Powers.of(a)
    if c is None:
        return powers.krylov(b.unsqueeze(1), length).transpose(1, 2).to(dtype)
    steps = _steps(length)
    columns = powers.krylov(b.unsqueeze(1), steps)  # [channels, steps, d_state]
    rows = powers.times(steps).transposed().krylov(c, -(-length // steps))  # [channels, jumps * outputs, d_state]
    kernel = _products(rows, columns, dtype).unflatten(1, (-1, c.shape[1]))  # [channels, jumps, outputs, steps]
    return kernel.transpose(1, 2).flatten(2)[..., :length]


def _free_response(powers: Powers, c: Tensor | None, state: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Compute what a state adds to the outputs that follow, C A^(k+1) x for k below length.

    c, state: as in `linear_system`. dtype: of the last product. Returns [batch, length, channels, outputs].
    """
    a = powers.squared[0]
    if c is None:
        c = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).unsqueeze(0)
    steps = _steps(length)
    first = _apply(_transposed(a), c)
    rows = powers.transposed().krylov(first, steps)  # [channels, steps * outputs, d_state]
    starts = powers.times(steps).krylov(state.transpose(0, 1), -(-length // steps))
    out = _products(starts, rows, dtype)  # [channels, jumps * batch, steps * outputs]
    out = out.unflatten(2, (steps, -1)).unflatten(1, (-1, len(state)))
    return out.permute(2, 1, 3, 0, 4).flatten(1, 2)[:, :length]


def _last_state(u: Tensor, restarts: Tensor | None, powers: Powers, b: Tensor, state: Tensor) -> Tensor:
    """Compute the state behind the last position. Arguments and result are those of `linear_system`."""
    batch, seq, channels = u.shape
    u = u.to(_sum_dtype(u))
    if restarts is not None:  # only the last document counts
        restarts = restarts.long()
        to_come = restarts.flip(1).cumsum(1).flip(1) - restarts
        u = u.masked_fill((to_come > 0).unsqueeze(2), 0)
        state = state.masked_fill((restarts.sum(1) > 0)[:, None, None], 0)
    # Sum over the positions of each part; zeros before the first position add nothing.
    steps = _steps(seq)
    jumps = _power_of_two(-(-seq // steps))
    columns = _cast(powers.krylov(b.unsqueeze(1), steps), u.dtype).flip(1)  # the newest position is the last one
    signal = F.pad(u.permute(2, 0, 1), (jumps * steps - seq, 0)).reshape(channels, batch * jumps, steps)
    parts = (signal.to(columns.dtype) @ columns).unflatten(1, (batch, jumps))
    # Join neighbours until one part is left.
    jump = powers.times(steps)
    for level in range(jumps.bit_length() - 1):
        earlier, later = parts[:, :, 0::2], parts[:, :, 1::2]
        parts = later + _apply(jump[level], earlier.flatten(1, 2)).unflatten(1, (batch, -1))
    return powers.advance(state, seq) + parts[:, :, 0].transpose(0, 1).to(state.dtype)


@dataclass(frozen=True)
class Powers:
    """The powers A, A^2, A^4, A^8, ... in float64, each computed when it is first asked for.

    squared: those there are, of all that go back to the same matrix. skipped: how many of them are passed over.
    turned: whether matrices are transposed.
    """

    squared: list[Tensor]
    skipped: int = 0
    turned: bool = False

    @classmethod
    def of(cls, a: Tensor) -> Powers:
        return cls([a.to(torch.promote_types(a.dtype, torch.float64))])

    def __getitem__(self, level: int) -> Tensor:
        level += self.skipped
        while len(self.squared) <= level:
            last = self.squared[-1]
            self.squared.append(last @ last if last.dim() == 3 else last * last)
        return _transposed(self.squared[level]) if self.turned else self.squared[level]

    def times(self, steps: int) -> Powers:
        """Return the powers of A^steps, steps a power of two, from the same list."""
        return replace(self, skipped=self.skipped + steps.bit_length() - 1)

    def transposed(self) -> Powers:
        """Return those of the transposed matrix, from the same list."""
        return replace(self, turned=True)

    def advance(self, state: Tensor, steps: int) -> Tensor:
        """Compute what becomes of a state without inputs, A^steps x. state: [batch, channels, d_state]."""
        x = state.transpose(0, 1)
        for level in range(steps.bit_length()):
            if steps >> level & 1:
                x = _apply(self[level], x)
        return x.transpose(0, 1).to(state.dtype)

    def krylov(self, x: Tensor, steps: int) -> Tensor:
        """Compute A^k x for k below steps.

        x: [channels, columns, d_state]. Returns [channels, steps * columns, d_state].
        """
        columns = x.shape[1]
        x = x.to(self.squared[0].dtype)
        for level in range((steps - 1).bit_length()):
            x = torch.cat((x, _apply(self[level], x)), 1)
        return x[:, : steps * columns]


def _step(
    u: Tensor, restarts: Tensor | None, a: Tensor, b: Tensor, c: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Go on by one position. u: [batch, 1, channels]. restarts: [batch, 1]."""
    if restarts is not None:
        state = state.masked_fill(restarts.unsqueeze(2), 0)
    moved = _apply(a, state.transpose(0, 1)).transpose(0, 1)
    state = (moved + b * u.squeeze(1).to(_sum_dtype(u)).unsqueeze(2)).to(state.dtype)
    if c is None:
        return state.unsqueeze(1).to(u.dtype), state
    out = (c * state.unsqueeze(2)).sum(-1)
    out = 2 * out.real if out.is_complex() else out
    return out.unsqueeze(1).to(u.dtype), state


def _products(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply each row by each column, and take twice the real part if they are complex.

    rows: [channels, rows, d_state]. columns: [channels, columns, d_state]. Returns [channels, rows, columns] of dtype.
    """
    if rows.is_complex():
        rows, columns = (torch.view_as_real(x.resolve_conj()).flatten(2) for x in (2 * rows.conj(), columns))
    return rows.to(dtype) @ columns.to(dtype).mT


def _apply(a: Tensor, x: Tensor) -> Tensor:
    """Apply A to columns, in its dtype. x: [channels, columns, d_state], like the result."""
    x = x.to(a.dtype)
    if a.dim() == 2:
        return a.unsqueeze(1) * x
    return x @ (a[0].T if len(a) == 1 else a.mT)


def _transposed(a: Tensor) -> Tensor:
    return a.mT if a.dim() == 3 else a


def _steps(length: int) -> int:
    """Choose a power of two near the root of the length."""
    return _power_of_two(math.isqrt(length - 1) + 1)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _sum_dtype(u: Tensor) -> torch.dtype:
    return torch.promote_types(u.dtype, torch.float32)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to a real dtype, or to the complex one of its precision."""
    return x.to(dtype.to_complex() if x.is_complex() else dtype)
