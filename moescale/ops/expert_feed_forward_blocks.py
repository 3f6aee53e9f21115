"""The experts on a processor: block of rows by block, all its steps while it is in the cache, from gather to sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moescale.ops.product import multiply, widens
from moescale.ops.shares import Share, cut, on_threads, slice_rows

aten = torch.ops.aten


def feed_forward_in_blocks(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, weight: Tensor, token: Tensor, sizes: list[int],
    activation: str,
) -> Tensor:
    """Answer as `expert_feed_forward` does. weight, token: of its routing. sizes: rows of each expert. -> like x"""
    return _Blocks.apply(x, gate, up, down, weight, token, sizes, activation)


class _Blocks(torch.autograd.Function):
    """Threads take equal shares of the rows and have their own sums over tokens.

    Kept for backward: x and the two products; copies of x and activations are made again. The bfloat16 product of
    processors that have it compiles a kernel for every new number of rows, which takes ten times longer than to run it,
    and routing brings new numbers at every step: row counts are rounded up there. A block is then multiplied with
    some rows that are not its own; what they leave is overwritten when their turn comes, or multiplied by zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, weight: Tensor, token: Tensor,
        sizes: list[int], activation: str,
    ) -> Tensor:
        d_ff, d_model = up.shape[1:]
        shares = cut(sizes, d_model, d_ff, round_up=x.dtype == torch.bfloat16 and not widens(x))
        wide = [x.new_empty(share.length, d_ff) for share in shares]  # of [assignments or a few more, d_ff]
        wide_gate = [None if gate is None else torch.empty_like(features) for features in wide]
        sums = [x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in shares]
        spare = [(x.new_zeros(share.longest, d_model), x.new_empty(share.longest, d_ff),
                  x.new_empty(share.longest, d_model)) for share in shares]
        factor = weight.to(x.dtype).unsqueeze(1)

        def take(share: Share, u: Tensor, g: Tensor | None, y: Tensor, spare: tuple[Tensor, Tensor, Tensor]) -> None:
            tokens, factors = token[share.rows], factor[share.rows]
            for block in share.blocks:
                a, h, o = (buffer[: block.length] for buffer in spare)
                torch.index_select(x, 0, tokens[block.own], out=a[: block.size])
                product = multiply(a, up[block.expert].T, u[block.rounded])
                if gate is None or g is None:
                    _activate(activation, product, h)
                else:
                    _activate(activation, multiply(a, gate[block.expert].T, g[block.rounded]), h).mul_(product)
                h[: block.size].mul_(factors[block.own])
                multiply(h, down[block.expert].T, o)
                y.index_add_(0, tokens[block.own], o[: block.size].to(y.dtype))

        on_threads(take, shares, wide, wide_gate, sums, spare)
        ctx.shares, ctx.activation = shares, activation
        ctx.save_for_backward(x, gate, up, down, weight, token, *wide, *wide_gate)
        return _added(sums).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shares: list[Share] = ctx.shares
        x, gate, up, down, weight, token, *features = ctx.saved_tensors
        wide, wide_gate = features[: len(shares)], features[len(shares) :]
        d_ff = up.shape[1]
        weights = (up, down) if gate is None else (up, down, gate)
        grads = [torch.empty_like(each) for each in weights]
        borrowed = [[torch.empty_like(each[0]) for each in weights] if share.blocks[0].borrowed else []
                    for share in shares]
        sums = [x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in shares]
        spare = [(x.new_zeros(2, share.longest, x.shape[1]), x.new_empty(2, share.longest, d_ff),
                  x.new_empty(min(share.longest, slice_rows(d_ff)), d_ff)) for share in shares]
        grad_weight, factor = torch.empty_like(weight), weight.to(x.dtype).unsqueeze(1)

        def take(
            share: Share, u: Tensor, g: Tensor | None, grad_x: Tensor, spare: tuple[Tensor, Tensor, Tensor],
            borrowed: list[Tensor],
        ) -> None:
            tokens, factors, grad_factors = token[share.rows], factor[share.rows], grad_weight[share.rows]
            for block in share.blocks:
                own, expert, more = tokens[block.own], block.expert, int(not block.first)
                grad_up, grad_down, *grad_gate = borrowed if block.borrowed else [each[expert] for each in grads]
                a, dy = spare[0][:, : block.length]
                torch.index_select(x, 0, own, out=a[: block.size])
                torch.index_select(grad, 0, own, out=dy[: block.size])
                hidden, dh = spare[1][:, : block.length]
                dy[block.size :] = hidden[block.size :] = 0  # cancels rows that are not its own
                multiply(dy, down[expert], dh)
                for part, rows in block.slices(d_ff):
                    h, dh_part, product = hidden[part], dh[part], spare[2][: rows.stop - rows.start]
                    if g is None:
                        _activate(ctx.activation, u[rows], h)
                    else:
                        _activate(ctx.activation, g[rows], h).mul_(u[rows])
                    torch.mul(dh_part, h, out=product)
                    torch.sum(product, 1, dtype=weight.dtype, out=grad_factors[rows])
                    h.mul_(factors[rows])
                    dh_part.mul_(factors[rows])
                multiply(dy.T, hidden, grad_down, more)
                da = dy  # done with
                if gate is None or g is None:
                    for part, rows in block.slices(d_ff):
                        _activate_backward(ctx.activation, dh[part], u[rows], dh[part])
                    multiply(dh, up[expert], da)
                else:
                    dgate = hidden  # done with
                    for part, rows in block.slices(d_ff):
                        product = torch.mul(dh[part], u[rows], out=spare[2][: rows.stop - rows.start])
                        _activate_backward(ctx.activation, product, g[rows], dgate[part])
                        dh[part].mul_(_activate(ctx.activation, g[rows], product))
                    multiply(dgate.T, a, grad_gate[0], more)
                    multiply(dgate, gate[expert], da)
                    multiply(dh, up[expert], da, 1)
                multiply(dh.T, a, grad_up, more)
                grad_x.index_add_(0, own, da[: block.size].to(grad_x.dtype))

        on_threads(take, shares, wide, wide_gate, sums, spare, borrowed)
        for share, parts in zip(shares, borrowed, strict=True):
            for whole, part in zip(grads, parts, strict=False):  # no parts where nothing is borrowed
                whole[share.blocks[0].expert].add_(part)
        grad_gate = None if gate is None else grads[2]
        return _added(sums).to(x.dtype), grad_gate, grads[0], grads[1], grad_weight, None, None, None


def _added(sums: list[Tensor]) -> Tensor:
    """Add up in the first of them."""
    for each in sums[1:]:
        sums[0].add_(each)
    return sums[0]


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
