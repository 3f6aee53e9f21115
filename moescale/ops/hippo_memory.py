"""HiPPO's memories of the documents in sequences, exact for values that are held for a step.

The past of a chunk of positions is some numbers, and the memory at each of its positions is a matrix times these and
times the values that came since: one product for the chunks of all documents that begin at the same position.

Over a window, the numbers are the memory before the chunk, and the matrices powers of one (`ops.discretize`). In the
memory of everything alike (`legs`) they depend on the time, so that there is no convolution. But a memory of `size`
coefficients is a polynomial of the time, and Gauss's quadrature with `size` points integrates its product with another
one exactly: for all that follows, the past is `size` values at points in time. The memory at t is the integral over
these and over the values that came since, each with Legendre polynomials at its time divided by t.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moescale.ops.discretize import discretize
from moescale.ops.hippo import Measure, hippo, legendre

CHUNK = 32


@dataclass(frozen=True)
class Memory:
    """What is remembered, in how many numbers, and over how many positions (`theta`; None in `legs`)."""

    measure: Measure
    size: int
    theta: float | None = None

    def system(self) -> tuple[Tensor, Tensor]:
        """Return A_bar [size, size] and B_bar [size] of one position, by zero-order hold, in float64."""
        assert self.theta is not None, "legs has another matrix at each position"
        return _system(self)


def hippo_memory(u: Tensor, positions: Tensor, memory: Memory, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute what is remembered after each position, and the last of it.

    u: [batch, seq, channels]. positions: [batch, seq] int64; 0 = a document begins, with nothing remembered.
    state: [batch, channels, size], from before the first position; None = zeros, as after values that were zero.
    Returns [batch, seq, channels, size] in the dtype of u, and the last state, in at least float32, in which sums are.
    Matrices are made in float64.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    if state is None:
        state = u.new_zeros(len(u), u.shape[2], memory.size, dtype=dtype)
    remembered = _HippoMemory.apply(u.to(dtype), positions, state.to(dtype), memory)
    return remembered.to(u.dtype), remembered[:, -1]


def hippo_memory_reference(u: Tensor, positions: Tensor, memory: Memory, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same position by position, with exponentials of A, by autograd alone, in float64."""
    held, outs = state.double(), []
    for t in range(u.shape[1]):
        before = positions[:, t].double()
        if memory.theta is None:  # in the logarithm of time x' = (A x + B u) / t is x' = A x + B u
            steps = ((before + 1) / before.clamp(min=1e-30)).log()
            a_bar, b_bar = discretize(*hippo("legs", memory.size), steps, "zero_order_hold")  # of each row
        else:
            a_bar, b_bar = memory.system()
            held = held.masked_fill((before == 0).view(-1, 1, 1), 0)
        held = held @ a_bar.mT + u[:, t, :, None].double() * b_bar.unsqueeze(-2)
        outs.append(held)
    return torch.stack(outs, 1), held


def after_zeros(state: Tensor, begin: Tensor, count: int, memory: Memory) -> Tensor:
    """Compute what becomes of a memory by `count` values that are zero.

    state: [batch, channels, size]. begin: [batch], how many values it has seen. Returns the same shape and dtype.
    """
    if memory.theta is not None:
        power = torch.linalg.matrix_power(memory.system()[0], count)
        return state @ power.T.to(state.device, state.dtype)
    ratio = begin.double().cpu() / (begin.cpu() + count)
    times = ratio.unsqueeze(1) * _quadrature(memory.size)[0]
    move = ratio.view(-1, 1, 1) * _polynomials(times, memory.size)  # [batch, points, size]
    return _numbers(state, memory) @ move.to(state.device, state.dtype)


class _HippoMemory(torch.autograd.Function):
    """Go over the chunks of all documents in the order of their beginnings in time."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, positions: Tensor, state: Tensor, memory: Memory) -> Tensor:
        batch, seq, channels = u.shape
        size, chunks = memory.size, _cut(positions)
        values = u.reshape(batch * seq, channels)
        held = u.new_empty(batch * seq, channels, size)
        for begin, token, inside in chunks:
            # What comes into the chunks: numbers for the past, which is nothing where a document begins, and values.
            past = torch.where((token[:, 0] % seq > 0).view(-1, 1, 1), held[token[:, 0] - 1], state[token[:, 0] // seq])
            past = _numbers(past, memory) if begin else torch.zeros_like(past)
            new = values[token].masked_fill(~inside.unsqueeze(2), 0).transpose(1, 2)
            move = _move(memory, begin, token.shape[1], u.dtype, u.device)
            out = (torch.cat((past, new), 2) @ move.flatten(1)).unflatten(2, (-1, size)).transpose(1, 2)
            held[token[inside]] = out[inside]
        ctx.chunks, ctx.memory = chunks, memory
        return held.view(batch, seq, channels, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        batch, seq, channels, size = grad.shape
        grad_held = grad.flatten(0, 1).clone()
        grad_values = grad.new_zeros(batch * seq, channels)
        grad_state = grad.new_zeros(batch, channels, size)
        for begin, token, inside in reversed(ctx.chunks):
            grad_out = grad_held[token].masked_fill(~inside[:, :, None, None], 0).transpose(1, 2)
            move = _move(ctx.memory, begin, token.shape[1], grad.dtype, grad.device)
            parts = grad_out.flatten(2) @ move.flatten(1).T
            grad_values[token[inside]] = parts[:, :, size:].transpose(1, 2)[inside]
            if begin:
                past, first = _numbers(parts[:, :, :size], ctx.memory, backward=True), token[:, 0] % seq == 0
                grad_held[token[~first, 0] - 1] += past[~first]
                grad_state[token[first, 0] // seq] = past[first]
        return grad_values.view(batch, seq, channels), None, grad_state, None


def _cut(positions: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Cut documents into chunks, those that begin at the same time together, by time.

    They begin at multiples of `CHUNK`, and where a row does. Returns for each time: the position of the first
    tokens, the numbers of the tokens among all of the batch [chunks, length], and whether they belong to the
    chunk, which may be shorter than others.
    """
    starts = positions % CHUNK == 0
    starts[:, 0] = True
    first = starts.flatten().nonzero().flatten()
    ends = torch.cat((first[1:], first.new_tensor([positions.numel()])))
    begins, lengths = positions.flatten()[first], ends - first
    order = begins.sort(stable=True).indices
    times, counts = begins[order].unique_consecutive(return_counts=True)
    chunks = []
    for time, some in zip(times.tolist(), order.split(counts.tolist()), strict=True):
        offset = torch.arange(int(lengths[some].max()), device=positions.device)
        inside = offset < lengths[some].unsqueeze(1)
        token = (first[some].unsqueeze(1) + offset).clamp(max=positions.numel() - 1)
        chunks.append((time, token, inside))
    return chunks


def _numbers(held: Tensor, memory: Memory, backward: bool = False) -> Tensor:
    """Turn memories into the numbers that stand for the past, or gradients back. held, result: [..., size]."""
    if memory.theta is not None:
        return held
    matrix = _quadrature(memory.size)[1].to(held.device, held.dtype)
    return held @ (matrix.T if backward else matrix)


def _move(memory: Memory, begin: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix from the numbers of the past, and `length` values, to as many memories after `begin` values.

    Returns [size + length, length, size].
    """
    if memory.theta is not None:
        begin = 0  # they are the same at all times
    return _made(memory, begin, length, dtype, device)


@lru_cache(maxsize=256)
def _made(memory: Memory, begin: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (_window(memory, length) if memory.theta else _everything(memory, begin, length)).to(device, dtype)


def _window(memory: Memory, length: int) -> Tensor:
    """Make the matrix of a memory of a window: powers of A_bar, and what they make of B_bar."""
    a_bar, b_bar = memory.system()
    powers = [torch.eye(memory.size, dtype=a_bar.dtype)]
    for _ in range(length):
        powers.append(a_bar @ powers[-1])
    response = torch.stack([power @ b_bar for power in powers[:length]])
    values = response.new_zeros(length, length, memory.size)
    for index in range(length):
        values[index, index:] = response[: length - index]
    return torch.cat((torch.stack(powers[1:]).permute(2, 0, 1), values))


def _everything(memory: Memory, begin: int, length: int) -> Tensor:
    """Make the matrix of `legs`."""
    after = begin + 1 + torch.arange(length, dtype=torch.float64)
    times = begin * _quadrature(memory.size)[0].unsqueeze(1) / after
    past = begin / after.unsqueeze(1) * _polynomials(times, memory.size)
    # A value counts by the integral of the polynomials over its step; none counts before it has come.
    borders = (begin + torch.arange(length + 1, dtype=torch.float64)).unsqueeze(1) / after
    values = _integrals(borders, memory.size).diff(dim=0)
    return torch.cat((past, values * torch.ones(length, length).triu().unsqueeze(2)))


@lru_cache(maxsize=16)
def _system(memory: Memory) -> tuple[Tensor, Tensor]:
    assert memory.theta is not None
    return discretize(*hippo(memory.measure, memory.size), 1 / memory.theta, "zero_order_hold")


@lru_cache(maxsize=16)
def _quadrature(size: int) -> tuple[Tensor, Tensor]:
    """Return the points of Gauss's quadrature on [0, 1], [size], and the matrix from coefficients to weighed values."""
    points, weights = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(size))
    points, weights = (points + 1) / 2, weights / 2
    return points, _polynomials(points, size).T * weights


def _polynomials(x: Tensor, size: int) -> Tensor:
    """Evaluate the orthonormal Legendre polynomials of [0, 1]. x: [...]. Returns [..., size]."""
    return (2 * torch.arange(size, dtype=x.dtype, device=x.device) + 1).sqrt() * legendre(2 * x - 1, size)


def _integrals(x: Tensor, size: int) -> Tensor:
    """Evaluate the integrals of the same from 0, but for constants. x: [...]. Returns [..., size]."""
    polynomials = legendre(2 * x - 1, size + 1)
    before = torch.cat((torch.zeros_like(x).unsqueeze(-1), polynomials[..., : size - 1]), -1)
    degree = torch.arange(size, dtype=x.dtype, device=x.device)
    return (polynomials[..., 1:] - before) / (2 * (2 * degree + 1).sqrt())
