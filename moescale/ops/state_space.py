"""Linear systems that do not change over time: x_t = A x_(t-1) + B u_t, y_t = C x_t, of documents in sequences.

Outputs come by FFT with the kernel (C B, C A B, C A^2 B, ...) (LSSL, section 3). Powers of A are applied by doubling,
a few columns at a time: no tensor has d_state numbers for each position, unless the outputs do.

Three letters as in the papers. A is dense, [channels, d_state, d_state], or diagonal, [channels, d_state]. If it is
complex, each of its states stands for itself and its conjugate, so that outputs are twice the real part. One system for
all channels has 1 instead of channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

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
    return out + free_response(u, restarts, powers, c, state), last_state(u, restarts, powers, b, state)


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
    return _kernels(powers, b.unsqueeze(1), c, length, dtype)[:, 0]


def stepped_kernel(
    discrete: Callable[[Tensor], tuple[Tensor, Tensor]], step: Tensor, c: Tensor, length: int, dtype: torch.dtype
) -> Tensor:
    """Compute the kernel C A^k B of a fixed system that each channel takes in steps of its own.

    discrete: from steps [channels] in float64 to dense A [channels, d_state, d_state] and B [channels, d_state],
    functions of one matrix. c, dtype: as in `krylov_kernel`. Returns [channels, outputs, length], with gradients to
    step and c. None of them passes through powers: A commutes with its derivative, so that the kernel's derivative,
    k C A^(k-1) A' B + C A^k B', is made of two more kernels of the same powers.
    """
    with torch.no_grad(), forward_ad.dual_level():
        made = discrete(forward_ad.make_dual(step.detach(), torch.ones_like(step)))
        (a, a_slope), (b, b_slope) = (forward_ad.unpack_dual(each) for each in made)
    powers = Powers.of(a)
    kernel = _kernels(powers, b.unsqueeze(1), c, length, dtype)[:, 0]
    if not step.requires_grad:
        return kernel
    with torch.no_grad():
        inputs = torch.stack(((a_slope @ b.unsqueeze(2)).squeeze(2), b_slope), 1)
        moved, taken_in = _kernels(powers, inputs, c, length, dtype).unbind(1)
        slope = taken_in + torch.arange(length, dtype=dtype, device=c.device) * F.pad(moved, (1, -1))
    return kernel + slope * (step - step.detach()).to(dtype)[:, None, None]  # adds nothing but its gradient


def _kernels(powers: Powers, b: Tensor, c: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Compute the kernels of several inputs.

    b: [channels, inputs, d_state]. Returns [channels, inputs, outputs, length] of dtype.
    """
    steps = _steps(-(-length * c.shape[1] // b.shape[1]))  # about as many rows as columns
    columns = powers.krylov(b, steps)  # [channels, steps * inputs, d_state]
    rows = powers.times(steps).transposed().krylov(c, -(-length // steps))  # [channels, jumps * outputs, d_state]
    rows = rows.unflatten(1, (-1, c.shape[1])).transpose(1, 2).flatten(1, 2)  # those of each output together
    kernels = _products(rows, columns, dtype).unflatten(2, (steps, -1))
    kernels = kernels.unflatten(1, (c.shape[1], -1)).permute(0, 4, 1, 2, 3).flatten(3)
    return kernels if kernels.shape[-1] == length else kernels[..., :length]


def free_response(u: Tensor, restarts: Tensor | None, powers: Powers, c: Tensor | None, state: Tensor) -> Tensor:
    """Compute what a state adds to the outputs that follow within its document, C A^(k+1) x.

    u: of which positions and dtype count. Others and the result are those of `linear_system`.
    """
    length = u.shape[1]
    a = powers.squared[0]
    if c is None:
        c = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).unsqueeze(0)
    steps = _steps(length)
    first = _apply(_transposed(a), c)
    rows = powers.transposed().krylov(first, steps)  # [channels, steps * outputs, d_state]
    starts = powers.times(steps).krylov(state.transpose(0, 1), -(-length // steps))
    out = _products(starts, rows, _sum_dtype(u)).to(u.dtype)  # [channels, jumps * batch, steps * outputs]
    out = out.unflatten(2, (steps, -1)).unflatten(1, (-1, len(state)))
    out = out.permute(2, 1, 3, 0, 4).flatten(1, 2)[:, :length]
    return out if restarts is None else out.masked_fill((restarts.cumsum(1) > 0)[:, :, None, None], 0)


def last_state(u: Tensor, restarts: Tensor | None, powers: Powers, b: Tensor, state: Tensor) -> Tensor:
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


def rows_after(c: Tensor, a: Tensor, steps: int, grad_dtype: torch.dtype = torch.float64) -> Tensor:
    """Compute C A^steps. c: [channels, rows, d_state] and a: [channels, d_state, d_state], both float64, like c.

    grad_dtype: in which products for the gradient of A are, which may be no better than that of the weights behind it.
    """
    out: Tensor = _RowsAfter.apply(c, a, steps, grad_dtype)
    return out


class _RowsAfter(torch.autograd.Function):
    """Apply the power, with a gradient that takes half of the products that those of all squarings take.

    The gradient of A is the sum of (C A^i)^T (A^(steps - 1 - i) G)^T over i below steps. With i = part j + k it is that
    of (A^k)^T Z (A^(part - 1 - k))^T over k below part, where Z is the sum over j, which is one product.
    """

    @staticmethod
    def forward(ctx: Any, c: Tensor, a: Tensor, steps: int, grad_dtype: torch.dtype) -> Tensor:
        ctx.grad_dtype, ctx.part = grad_dtype, math.gcd(steps, _steps(steps))
        ctx.parts, powers = steps // ctx.part, Powers.of(a)
        jump = powers.times(ctx.part).transposed()
        rows = jump.krylov(c, ctx.parts)
        last = _apply(jump[0], rows[:, -c.shape[1] :])
        ctx.save_for_backward(rows, *powers.squared)
        return last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, *squared = ctx.saved_tensors
        powers = Powers(squared)
        columns = powers.times(ctx.part).krylov(grad, ctx.parts)
        grad_a = (rows.mT @ columns.unflatten(1, (ctx.parts, -1)).flip(1).flatten(1, 2)).to(ctx.grad_dtype)
        # Twice as many k: those below, and those above.
        for level in range(ctx.part.bit_length() - 1):
            power = squared[level].mT.to(ctx.grad_dtype)
            grad_a = grad_a @ power + power @ grad_a
        grad_c = _apply(powers.times(ctx.part)[0], columns[:, -grad.shape[1] :])
        return grad_c, grad_a.double(), None, None


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
