"""What experts answer to tokens: widen, activate, narrow; each token's answers are weighed and added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.device import triton_runs
from moescale.ops.grouped_gemm import grouped_gemm, grouped_gemm_reference
from moescale.ops.permute import permute, unpermute

aten = torch.ops.aten
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
BLOCK_NUMBERS = 1 << 20  # of the widest features of a block of rows
SLICE_NUMBERS = 1 << 17  # of those of its rows that are activated together


class Assignments(Protocol):
    """Which token goes to which expert: what this file needs of a Routing.

    token: [assignments] int64, sorted by expert, none twice at one. weight: [assignments] float32.
    tokens_per_expert: [experts] int64, zeros allowed. row: [tokens, choices] int64, the inverse of token, -1 = none.
    """

    @property
    def token(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def tokens_per_expert(self) -> Tensor: ...
    @property
    def row(self) -> Tensor: ...


def expert_feed_forward(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, routing: Assignments, activation: str,
    keep: Tensor | None = None,
) -> Tensor:
    """Add up for each token weight * down(act(gate x) * up x) of its experts, or weight * down(act(up x)) without gate.

    The weight is applied to the hidden features, so that what the experts answer need not be kept for its gradient.
    x: [tokens, d_model]. gate, up: [experts, d_ff, d_model]. down: [experts, d_model, d_ff]. All of one dtype.
    activation: silu, gelu or relu. keep: [assignments, d_ff], what hidden features are multiplied by (dropout).
    -> like x; sums in float32, a token without experts gives zeros
    """
    if x.device.type == "cpu" and keep is None:
        sizes = routing.tokens_per_expert.tolist()
        return _InCache.apply(x, gate, up, down, routing.weight, routing.token, sizes, activation)
    if triton_runs(x) and keep is None and gate is not None and activation == "silu":
        from moescale.ops.expert_feed_forward_triton import fused_experts

        return fused_experts(x, gate, up, down, routing)
    rows = permute(x, routing.token, routing.row)  # [assignments, d_model]
    hidden = grouped_gemm(rows, up, routing.tokens_per_expert)  # [assignments, d_ff]
    act = ACTIVATIONS[activation]
    hidden = act(hidden) if gate is None else act(grouped_gemm(rows, gate, routing.tokens_per_expert)) * hidden
    hidden = hidden * routing.weight.unsqueeze(1).to(x.dtype)
    rows = grouped_gemm(hidden if keep is None else hidden * keep, down, routing.tokens_per_expert)
    return unpermute(rows, None, routing.token, routing.row)


def expert_feed_forward_reference(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, routing: Assignments, activation: str
) -> Tensor:
    """Do the same by loops over experts and autograd alone."""
    rows, act = x[routing.token], ACTIVATIONS[activation]
    hidden = grouped_gemm_reference(rows, up, routing.tokens_per_expert)
    if gate is None:
        hidden = act(hidden)
    else:
        hidden = act(grouped_gemm_reference(rows, gate, routing.tokens_per_expert)) * hidden
    rows = grouped_gemm_reference(hidden, down, routing.tokens_per_expert)
    return torch.zeros_like(x).index_add(0, routing.token, rows * routing.weight.unsqueeze(1).to(rows.dtype))


class _Block(NamedTuple):
    """Rows of one expert. length: with some of those behind, rounded up. first: of the expert."""

    expert: int
    start: int
    size: int
    length: int
    first: bool

    @property
    def own(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def rounded(self) -> slice:
        return slice(self.start, self.start + self.length)

    def slices(self, features: int) -> Iterator[tuple[slice, slice]]:
        """Its own rows, a few at a time: where they lie within the block, and among all rows."""
        for begin in range(0, self.size, _slice(features)):
            end = min(begin + _slice(features), self.size)
            yield slice(begin, end), slice(self.start + begin, self.start + end)


class _InCache(torch.autograd.Function):
    """On a processor: block of rows by block, all its steps while it is in the cache, from gather to sum.

    Kept for backward: x and the two products; copies of x and activations are made again. The bfloat16 product of
    processors compiles a kernel for every new number of rows, which takes ten times longer than to run it, and routing
    brings new numbers at every step: row counts are therefore rounded up. A block is then multiplied together with
    some rows that are not its own; what they leave is overwritten when their turn comes, or multiplied by zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, weight: Tensor, token: Tensor,
        sizes: list[int], activation: str,
    ) -> Tensor:
        d_ff, d_model = up.shape[1:]
        blocks = _cut(sizes, x.dtype, max(d_ff, d_model))
        longest = max(block.length for block in blocks)
        wide = x.new_empty(max(block.rounded.stop for block in blocks), d_ff)  # [assignments or a few more, d_ff]
        wide_gate = None if gate is None else torch.empty_like(wide)
        rows, hidden, out = x.new_zeros(longest, d_model), x.new_empty(longest, d_ff), x.new_empty(longest, d_model)
        y = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
        factor = weight.to(x.dtype).unsqueeze(1)
        for block in blocks:
            a, h, o = rows[: block.length], hidden[: block.length], out[: block.length]
            torch.index_select(x, 0, token[block.own], out=a[: block.size])
            u = torch.mm(a, up[block.expert].T, out=wide[block.rounded])
            if gate is None or wide_gate is None:
                _activate(activation, u, h)
            else:
                _activate(activation, torch.mm(a, gate[block.expert].T, out=wide_gate[block.rounded]), h).mul_(u)
            h[: block.size].mul_(factor[block.own])
            torch.mm(h, down[block.expert].T, out=o)
            y.index_add_(0, token[block.own], o[: block.size].to(y.dtype))
        ctx.blocks, ctx.activation = blocks, activation
        ctx.save_for_backward(x, gate, up, down, weight, token, wide, wide_gate)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down, weight, token, wide, wide_gate = ctx.saved_tensors
        longest, d_ff = max(block.length for block in ctx.blocks), up.shape[1]
        narrow, buffers = x.new_zeros(2, longest, x.shape[1]), x.new_empty(2, longest, d_ff)
        spare = x.new_empty(min(longest, _slice(d_ff)), d_ff)
        grad_x = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
        grad_up, grad_down, grad_weight = torch.empty_like(up), torch.empty_like(down), torch.empty_like(weight)
        grad_gate = None if gate is None else torch.empty_like(gate)
        factor = weight.to(x.dtype).unsqueeze(1)
        for block in ctx.blocks:
            own, expert, more = token[block.own], block.expert, int(not block.first)
            a, dy = narrow[:, : block.length]
            torch.index_select(x, 0, own, out=a[: block.size])
            torch.index_select(grad, 0, own, out=dy[: block.size])
            hidden, dh = buffers[:, : block.length]
            dy[block.size :] = hidden[block.size :] = 0  # cancels rows that are not its own
            torch.mm(dy, down[expert], out=dh)
            for part, rows in block.slices(d_ff):
                h, dh_part, product = hidden[part], dh[part], spare[: rows.stop - rows.start]
                if wide_gate is None:
                    _activate(ctx.activation, wide[rows], h)
                else:
                    _activate(ctx.activation, wide_gate[rows], h).mul_(wide[rows])
                torch.mul(dh_part, h, out=product)
                torch.sum(product, 1, dtype=weight.dtype, out=grad_weight[rows])
                h.mul_(factor[rows])
                dh_part.mul_(factor[rows])
            grad_down[expert].addmm_(dy.T, hidden, beta=more)
            da = dy  # done with
            if gate is None or wide_gate is None or grad_gate is None:
                for part, rows in block.slices(d_ff):
                    _activate_backward(ctx.activation, dh[part], wide[rows], dh[part])
                torch.mm(dh, up[expert], out=da)
            else:
                dgate = hidden  # done with
                for part, rows in block.slices(d_ff):
                    product = torch.mul(dh[part], wide[rows], out=spare[: rows.stop - rows.start])
                    _activate_backward(ctx.activation, product, wide_gate[rows], dgate[part])
                    dh[part].mul_(_activate(ctx.activation, wide_gate[rows], product))
                grad_gate[expert].addmm_(dgate.T, a, beta=more)
                torch.mm(dgate, gate[expert], out=da).addmm_(dh, up[expert])
            grad_up[expert].addmm_(dh.T, a, beta=more)
            grad_x.index_add_(0, own, da[: block.size].to(grad_x.dtype))
        return grad_x.to(x.dtype), grad_gate, grad_up, grad_down, grad_weight, None, None, None


def _cut(sizes: list[int], dtype: torch.dtype, features: int) -> list[_Block]:
    """Cut each expert's rows into equal blocks that the cache holds; an expert without rows has an empty one."""
    most = max(256, BLOCK_NUMBERS // features)
    blocks, start = [], 0
    for expert, rows in enumerate(sizes):
        end, pieces = start + rows, max(1, -(-rows // most))
        each = -(-rows // pieces)
        for piece in range(pieces):
            size = min(each, end - start)
            blocks.append(_Block(expert, start, size, _rounded(size, dtype), piece == 0))
            start += size
    return blocks


def _slice(features: int) -> int:
    """-> rows that steps which need no product take at a time"""
    return max(1, SLICE_NUMBERS // features)


def _rounded(size: int, dtype: torch.dtype) -> int:
    """Round to one of sixteen sizes an octave, and to 32 at least, where a new size costs a compilation."""
    if dtype != torch.bfloat16 or size == 0:
        return size
    unit = max(32, 1 << max(0, size.bit_length() - 5))
    return -(-size // unit) * unit


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
