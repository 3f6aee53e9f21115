"""The feed-forward of many experts over rows sorted by expert: widen, activate, narrow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.grouped_gemm import grouped_gemm, grouped_gemm_reference

aten = torch.ops.aten
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def expert_feed_forward(
    rows: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, tokens_per_expert: Tensor, activation: str,
    keep: Tensor | None = None,
) -> Tensor:
    """Apply to each row its expert: down(act(gate x) * up x), or down(act(up x)) without gate.

    rows: [assignments, d_model], sorted by expert. gate, up: [experts, d_ff, d_model]. down: [experts, d_model, d_ff].
    tokens_per_expert: [experts] int64, zeros allowed. activation: silu, gelu or relu. All of one dtype.
    keep: [assignments, d_ff], what the hidden features are multiplied by (dropout).
    -> [assignments, d_model]
    """
    if rows.device.type == "cpu" and keep is None:
        return _InCache.apply(rows, gate, up, down, tokens_per_expert.tolist(), activation)
    hidden = grouped_gemm(rows, up, tokens_per_expert)  # [assignments, d_ff]
    act = ACTIVATIONS[activation]
    hidden = act(hidden) if gate is None else act(grouped_gemm(rows, gate, tokens_per_expert)) * hidden
    return grouped_gemm(hidden if keep is None else hidden * keep, down, tokens_per_expert)


def expert_feed_forward_reference(
    rows: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, tokens_per_expert: Tensor, activation: str
) -> Tensor:
    """Do the same by loops over experts and autograd alone."""
    hidden = grouped_gemm_reference(rows, up, tokens_per_expert)
    act = ACTIVATIONS[activation]
    hidden = act(hidden) if gate is None else act(grouped_gemm_reference(rows, gate, tokens_per_expert)) * hidden
    return grouped_gemm_reference(hidden, down, tokens_per_expert)


class _InCache(torch.autograd.Function):
    """On a processor: one expert after another, all its steps while its rows are in the cache.

    Kept for backward: the rows and the two products; the activation is computed again. The bfloat16 product of
    processors compiles a kernel for every new number of rows, which takes ten times longer than to run it, and routing
    brings new numbers at every step: row counts are therefore rounded up. An expert is then multiplied together with
    some rows of those behind it; what they leave in the output is overwritten when their own turn comes.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, sizes: list[int], activation: str
    ) -> Tensor:
        ctx.sizes, ctx.activation = sizes, activation
        wide = rows.new_empty(len(rows), up.shape[1])
        wide_gate = None if gate is None else torch.empty_like(wide)
        out, hidden = torch.empty_like(rows), wide.new_empty(_longest(sizes, rows.dtype), up.shape[1])
        for expert, start, _, length in _ranges(sizes, rows.dtype):
            x, h = _block(rows, start, length), hidden[:length]
            u = _product(x, up[expert].T, wide, start)
            if gate is None or wide_gate is None:
                _activate(activation, u, h)
            else:
                _activate(activation, _product(x, gate[expert].T, wide_gate, start), h).mul_(u)
            _product(h, down[expert].T, out, start)
        ctx.save_for_backward(rows, gate, up, down, wide, wide_gate)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None, None]:
        rows, gate, up, down, wide, wide_gate = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        grad_gate = torch.empty_like(gate) if gate is not None else None
        grad_up, grad_down = torch.empty_like(up), torch.empty_like(down)
        buffers = rows.new_empty(4, _longest(ctx.sizes, rows.dtype), up.shape[1])
        for expert, start, size, length in _ranges(ctx.sizes, rows.dtype, empty=True):
            x, u = _block(rows, start, length), _block(wide, start, length)
            dy = _block(grad[start : start + size], 0, length)  # zeros beyond its own rows cancel the others'
            act, du, product, dgate = buffers[:, :length]
            torch.mm(dy, down[expert], out=du)
            if gate is None or grad_gate is None:
                _activate(ctx.activation, u, act)
                torch.mm(dy.T, act, out=grad_down[expert])
                du = _activate_backward(ctx.activation, du, u, product)
            else:
                g = _block(wide_gate, start, length)
                _activate(ctx.activation, g, act)
                torch.mm(dy.T, torch.mul(act, u, out=product), out=grad_down[expert])
                _activate_backward(ctx.activation, torch.mul(du, u, out=product), g, dgate)
                du.mul_(act)
                torch.mm(dgate.T, x, out=grad_gate[expert])
            torch.mm(du.T, x, out=grad_up[expert])
            _product(du, up[expert], grad_rows, start, None if gate is None else (dgate, gate[expert]))
        return grad_rows, grad_gate, grad_up, grad_down, None, None


def _product(a: Tensor, b: Tensor, into: Tensor, start: int, plus: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Write a @ b, and the product of `plus` added to it, into rows from `start` on, as many as there are.

    -> all rows of it
    """
    place = into[start : start + len(a)]
    product = torch.mm(a, b, out=place if len(place) == len(a) else into.new_empty(len(a), b.shape[1]))
    if plus is not None:
        product.addmm_(*plus)
    if len(place) < len(a):
        place.copy_(product[: len(place)])
    return product


def _longest(sizes: list[int], dtype: torch.dtype) -> int:
    return max(_rounded(size, dtype) for size in sizes)


def _ranges(sizes: list[int], dtype: torch.dtype, empty: bool = False) -> list[tuple[int, int, int, int]]:
    """-> expert, first row, rows, rows rounded up, for each expert with rows, or for all"""
    ranges, start = [], 0
    for expert, size in enumerate(sizes):
        if size or empty:
            ranges.append((expert, start, size, _rounded(size, dtype)))
        start += size
    return ranges


def _rounded(size: int, dtype: torch.dtype) -> int:
    """Round to one of eight sizes an octave, and to 64 at least, where a new size costs a compilation."""
    if dtype != torch.bfloat16 or size == 0:
        return size
    unit = max(64, 1 << max(0, size.bit_length() - 4))
    return -(-size // unit) * unit


def _block(rows: Tensor, start: int, length: int) -> Tensor:
    """Take `length` rows from `start` on; zeros behind the last one."""
    block = rows[start : start + length]
    return block if len(block) == length else F.pad(block, (0, 0, 0, length - len(block)))


def _activate(name: str, x: Tensor, out: Tensor) -> Tensor:
    if name == "silu":
        return aten.silu.out(x, out=out)
    return aten.gelu.out(x, out=out) if name == "gelu" else torch.clamp_min(x, 0, out=out)


def _activate_backward(name: str, grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    if name == "silu":
        return aten.silu_backward.grad_input(grad, x, grad_input=out)
    if name == "gelu":
        return aten.gelu_backward.grad_input(grad, x, grad_input=out)
    return aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
