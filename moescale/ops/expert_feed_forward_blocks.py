"""The experts on a processor: each block of rows goes through all steps while it is in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moescale.ops import native
from moescale.ops.expert_rows import activate, activate_backward, add_rows, gather_rows
from moescale.ops.product import by_onednn, multiply, upcasts
from moescale.ops.shares import Share, cut, run_on_threads

NARROW = 256  # d_ff up to which gate and up are multiplied as one matrix, a copy that pays


def feed_forward_in_blocks(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, weight: Tensor, token: Tensor, sizes: list[int],
    activation: str,
) -> Tensor:
    """Compute `expert_feed_forward` on the CPU, block by block.

    x, gate, up, down, activation: as there. weight, token: those of its routing. sizes: rows of each expert. -> like x
    Raises ValueError for matrices that do not fit each other or x.
    """
    experts, d_ff, d_model = up.shape
    if x.shape[1] != d_model or down.shape != (experts, d_model, d_ff) or (gate is not None and gate.shape != up.shape):
        shapes = [list(each.shape) for each in (x, gate, up, down) if each is not None]
        raise ValueError(f"features and matrices of experts do not fit each other: {shapes}")
    weight = weight.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    return _Blocks.apply(x.contiguous(), gate, up, down, weight, token.contiguous(), sizes, activation)


class _Blocks(torch.autograd.Function):
    """Each thread takes an equal share of the rows and has its own sum over tokens.

    Backward keeps x and the products of gate and up, and computes gathered rows and activations again. oneDNN compiles
    a kernel for every new number of rows, which takes ten times longer than to run it, and routing brings new numbers
    at every step: row counts are rounded up for it, and always to even ones, as products of our own need them. A block
    is then multiplied together with some of the rows behind it; what that writes is overwritten when their turn comes,
    or multiplied by zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, weight: Tensor, token: Tensor,
        sizes: list[int], activation: str,
    ) -> Tensor:
        d_ff, d_model = up.shape[1:]
        compiled = is_compiled(x, gate, up, down, activation)
        round_up = by_onednn(x) and not (compiled and native.multiplies(x.dtype, d_model, d_ff))
        shares = cut(sizes, d_model, d_ff, round_up=round_up, compiled=compiled)
        # Per share, so that threads write apart: the products of gate and up, and a sum over tokens.
        products = [_Features.empty(gate, up, share.length) for share in shares]
        sums = _sums(x, len(shares))

        def run_share(share: Share, products: _Features, total: Tensor) -> None:
            tokens, factors, matrices = token[share.rows], weight[share.rows], _Matrices(gate, up)
            row_buffer = x.new_zeros(2, share.longest, d_model)
            hidden_buffer = x.new_empty(share.longest, d_ff)
            for block in share.blocks:
                (rows, answers), hidden = row_buffer[:, : block.length], hidden_buffer[: block.length]
                gather_rows(x, tokens[block.rows], rows[: block.size])
                first = products.take(block.rounded_rows)
                for matrix, product in zip(matrices.take(block.expert), first.stored, strict=True):
                    multiply(rows, matrix.T, product)
                first = products.take(block.rows)
                activate(activation, first.gate, first.up, factors[block.rows], hidden[: block.size])
                multiply(hidden, down[block.expert].T, answers)
                add_rows(total, tokens[block.rows], answers[: block.size])

        if compiled:
            _forward(x, gate, up, down, weight, token, shares, products, sums)
        else:
            run_on_threads(run_share, shares, products, sums)
        ctx.shares, ctx.activation, ctx.compiled = shares, activation, compiled
        ctx.save_for_backward(x, gate, up, down, weight, token, *(each for part in products for each in part.stored))
        return _total(sums).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shares: list[Share] = ctx.shares
        x, gate, up, down, weight, token, *stored = ctx.saved_tensors
        d_ff, d_model = up.shape[1:]
        grad = grad.contiguous()
        each = len(stored) // len(shares)
        products = [_Features.of(gate, stored[at : at + each]) for at in range(0, len(stored), each)]
        # Gradients of the experts' matrices. An expert that begins in another thread's share is `borrowed`: its
        # gradients here go to matrices of this share's own, and are added to that thread's at the end.
        grads = _ExpertGrads.like(gate, up, down)
        borrowed = [_ExpertGrads.like_one(gate, up, down) if share.blocks[0].borrowed else None for share in shares]
        sums, grad_weight = _sums(x, len(shares)), torch.empty_like(weight)

        def run_share(share: Share, products: _Features, grad_x: Tensor, borrowed: _ExpertGrads | None) -> None:
            matrices = _Matrices(gate, up)
            row_buffer = x.new_zeros(2, share.longest, d_model)
            hidden_buffer = x.new_empty(2, share.longest, d_ff)
            grad_products = _Features.empty(gate, up, share.longest)
            tokens, factors, grad_factors = token[share.rows], weight[share.rows], grad_weight[share.rows]
            for block in share.blocks:
                own_tokens, expert = tokens[block.rows], block.expert
                own_grads = borrowed if borrowed is not None and block.borrowed else grads.take(expert)
                # Gather the rows and their gradients, with zeros behind the block.
                rows, grad_out = row_buffer[:, : block.length]
                hidden, grad_hidden = hidden_buffer[:, : block.length]
                gather_rows(x, own_tokens, rows[: block.size])
                gather_rows(grad, own_tokens, grad_out[: block.size])
                rows[block.size :] = grad_out[block.size :] = hidden[block.size :] = 0
                multiply(grad_out, down[expert], grad_hidden)
                # Hidden features again, and the gradients of weights and of the products of gate and up.
                grad_first = grad_products.take(slice(block.length))
                for tensor in grad_first.stored:
                    tensor[block.size :] = 0
                first, own = products.take(block.rows), slice(block.size)
                own_first = grad_first.take(own)
                activate_backward(ctx.activation, first.gate, first.up, factors[block.rows], grad_hidden[own],
                                  hidden[own], own_first.gate, own_first.up, grad_factors[block.rows])
                # The gradients of the matrices, and of the rows in the place of the output's.
                multiply(grad_out.T, hidden, own_grads.down, not block.first)
                for index, matrix in enumerate(matrices.take(expert)):
                    multiply(grad_first.stored[index], matrix, grad_out, accumulate=index > 0)
                own_grads.add_first(grad_first, rows, not block.first)
                # Back to the tokens.
                add_rows(grad_x, own_tokens, grad_out[: block.size])

        if ctx.compiled:
            _backward(x, gate, up, down, weight, token, grad, shares, products, grads, borrowed, sums, grad_weight)
        else:
            run_on_threads(run_share, shares, products, sums, borrowed)
        for share, part in zip(shares, borrowed, strict=True):
            if part is not None:
                grads.take(share.blocks[0].expert).add_(part)
        return _total(sums).to(x.dtype), grads.gate, grads.up, grads.down, grad_weight, None, None, None


def _forward(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, weight: Tensor, token: Tensor, shares: list[Share],
    products: list[_Features], sums: list[Tensor],
) -> None:
    """Compute all shares in one compiled call. products: those of gate and up, which are written. sums: added to"""
    d_ff, d_model = up.shape[1:]
    fields = []
    for share, first, total in zip(shares, products, sums, strict=True):
        rows, hidden = x.new_zeros(2, share.longest, d_model), x.new_empty(share.longest, d_ff)
        fields.append([*_both_ways(share, gate, up, weight, token, first), *rows, hidden, total])
    native.call_shares("forward_shares", x.dtype, fields, d_model, d_ff, gate, up, down, x, products[0].up.stride(0))


def _both_ways(
    share: Share, gate: Tensor | None, up: Tensor, weight: Tensor, token: Tensor, first: _Features
) -> list[Tensor | int | None]:
    """List the fields that a share begins with in both passes."""
    return [share.table, len(share.blocks), _Matrices(gate, up).both, token[share.rows], weight[share.rows], first.gate,
            first.up]


def _backward(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, weight: Tensor, token: Tensor, grad: Tensor,
    shares: list[Share], products: list[_Features], grads: _ExpertGrads, borrowed: list[_ExpertGrads | None],
    sums: list[Tensor], grad_weight: Tensor,
) -> None:
    """The same of the backward pass. grad: of the output. grads, borrowed, grad_weight: written. sums: added to"""
    d_ff, d_model = up.shape[1:]
    fields = []
    for share, first, own_borrowed, total in zip(shares, products, borrowed, sums, strict=True):
        rows, hidden = x.new_zeros(2, share.longest, d_model), x.new_empty(2, share.longest, d_ff)
        grad_first = _Features.empty(gate, up, share.longest)
        fields.append([*_both_ways(share, gate, up, weight, token, first), *rows, *hidden, grad_first.gate,
                       grad_first.up, _Matrices(gate, up).both, *(own_borrowed or (None, None, None)), total,
                       grad_weight[share.rows]])
    native.call_shares("backward_shares", x.dtype, fields, d_model, d_ff, gate, up, down, x, products[0].up.stride(0),
                       grad, *grads)


class _Features(NamedTuple):
    """Features of rows on the side of gate and up, [rows, d_ff] each. stored: the tensors that products write.

    Of few features one tensor stores both, side by side, so that one product makes them.
    """

    gate: Tensor | None
    up: Tensor
    stored: tuple[Tensor, ...]

    @staticmethod
    def of(gate: Tensor | None, stored: Sequence[Tensor]) -> _Features:
        """Take tensors that were stored. gate: the matrices, or None without any"""
        if gate is None:
            return _Features(None, stored[0], tuple(stored))
        first, second = stored[0].chunk(2, 1) if len(stored) == 1 else stored
        return _Features(first, second, tuple(stored))

    @staticmethod
    def empty(gate: Tensor | None, up: Tensor, rows: int) -> _Features:
        """Allocate those of so many rows, without values. gate, up: the matrices"""
        d_ff = up.shape[1]
        widths = [d_ff] if gate is None else [2 * d_ff] if d_ff <= NARROW else [d_ff, d_ff]
        return _Features.of(gate, [up.new_empty(rows, width) for width in widths])

    def take(self, rows: slice) -> _Features:
        return _Features(None if self.gate is None else self.gate[rows], self.up[rows],
                         tuple(each[rows] for each in self.stored))


class _Matrices:
    """One expert's gate and up at a time, as products take them: one above the other where they are narrow."""

    def __init__(self, gate: Tensor | None, up: Tensor) -> None:
        self.gate, self.up, self.expert = gate, up, -1
        d_ff, d_model = up.shape[1:]
        self.both = None if gate is None or d_ff > NARROW else up.new_empty(2 * d_ff, d_model)

    def take(self, expert: int) -> tuple[Tensor, ...]:
        """Make the matrices whose products `_Features` stores. -> [features, d_model] each"""
        if self.gate is None:
            return (self.up[expert],)
        if self.both is None:
            return self.gate[expert], self.up[expert]
        if expert != self.expert:
            torch.cat((self.gate[expert], self.up[expert]), out=self.both)
            self.expert = expert
        return (self.both,)


class _ExpertGrads(NamedTuple):
    """Gradients of gate, up and down: [experts, ...] each, or of one expert. gate: None without one"""

    gate: Tensor | None
    up: Tensor
    down: Tensor

    @staticmethod
    def like(gate: Tensor | None, up: Tensor, down: Tensor) -> _ExpertGrads:
        """Allocate the gradients of these matrices, without values."""
        return _ExpertGrads(None if gate is None else torch.empty_like(gate), torch.empty_like(up),
                            torch.empty_like(down))

    @staticmethod
    def like_one(gate: Tensor | None, up: Tensor, down: Tensor) -> _ExpertGrads:
        """Allocate the gradients of one expert, without values."""
        return _ExpertGrads.like(None if gate is None else gate[0], up[0], down[0])

    def take(self, expert: int) -> _ExpertGrads:
        """Take the part of one expert."""
        return _ExpertGrads(None if self.gate is None else self.gate[expert], self.up[expert], self.down[expert])

    def add_first(self, grad: _Features, rows: Tensor, accumulate: bool) -> None:
        """Write the gradients of one expert's gate and up, or add to them. grad: of its products with these rows"""
        targets = (self.up,) if self.gate is None else (self.gate, self.up)
        if len(targets) == len(grad.stored):
            for each, target in zip(grad.stored, targets, strict=True):
                multiply(each.T, rows, target, accumulate)
            return
        for target, part in zip(targets, (grad.stored[0].T @ rows).chunk(2), strict=True):
            target.add_(part) if accumulate else target.copy_(part)

    def add_(self, other: _ExpertGrads) -> None:
        for mine, theirs in zip(self, other, strict=True):
            if mine is not None and theirs is not None:
                mine.add_(theirs)


def is_compiled(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str) -> bool:
    """Say whether a compiled function computes a whole share: the same, without a word of Python between two steps."""
    return (gate is not None and activation == "silu" and native.runs(x) and not upcasts(x)
            and all(matrix.is_contiguous() and matrix.dtype == x.dtype for matrix in (gate, up, down)))


def _sums(x: Tensor, shares: int) -> list[Tensor]:
    """Make each share a sum like x of its own, in float32 at least, of zeros."""
    return [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(shares)]


def _total(sums: list[Tensor]) -> Tensor:
    """Add up all sums in the first of them."""
    for each in sums[1:]:
        sums[0].add_(each)
    return sums[0]
