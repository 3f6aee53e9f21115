"""The experts on a processor: each block of rows goes through all steps, gather to sum, while it is in the cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moescale.ops.product import multiply, upcasts
from moescale.ops.shares import Share, cut, run_on_threads, slice_rows

aten = torch.ops.aten


def feed_forward_in_blocks(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, weight: Tensor, token: Tensor, sizes: list[int],
    activation: str,
) -> Tensor:
    """Compute `expert_feed_forward` on the CPU, block by block.

    x, gate, up, down, activation: as there. weight, token: those of its routing. sizes: rows of each expert. -> like x
    """
    return _Blocks.apply(x, gate, up, down, weight, token, sizes, activation)


class _Blocks(torch.autograd.Function):
    """Each thread takes an equal share of the rows and has its own sum over tokens.

    Backward keeps x and the two products, and computes gathered rows and activations again. Where a processor has
    bfloat16 products, they compile a kernel for every new number of rows, which takes ten times longer than to run it,
    and routing brings new numbers at every step: row counts are rounded up there. A block is then multiplied together
    with some of the rows behind it; what that writes is overwritten when their turn comes, or multiplied by zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, weight: Tensor, token: Tensor,
        sizes: list[int], activation: str,
    ) -> Tensor:
        d_ff, d_model = up.shape[1:]
        shares = cut(sizes, d_model, d_ff, round_up=x.dtype == torch.bfloat16 and not upcasts(x))
        # Per share, so that threads write apart: the two products, a sum over tokens, and buffers of one block.
        act_up = [x.new_empty(share.length, d_ff) for share in shares]  # [rows of the share or a few more, d_ff]
        act_gate = [None if gate is None else torch.empty_like(each) for each in act_up]
        sums = [x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in shares]
        buffers = [(x.new_zeros(share.longest, d_model), x.new_empty(share.longest, d_ff),
                    x.new_empty(share.longest, d_model)) for share in shares]
        factor = weight.to(x.dtype).unsqueeze(1)

        def run_share(
            share: Share, act_up: Tensor, act_gate: Tensor | None, total: Tensor,
            buffers: tuple[Tensor, Tensor, Tensor],
        ) -> None:
            tokens, factors = token[share.rows], factor[share.rows]
            for block in share.blocks:
                rows, hidden, out = (buffer[: block.length] for buffer in buffers)
                # Gather the rows, multiply by up and gate, activate.
                torch.index_select(x, 0, tokens[block.rows], out=rows[: block.size])
                product = multiply(rows, up[block.expert].T, act_up[block.rounded_rows])
                if gate is None or act_gate is None:
                    _activate(activation, product, hidden)
                else:
                    gated = multiply(rows, gate[block.expert].T, act_gate[block.rounded_rows])
                    _activate(activation, gated, hidden).mul_(product)
                # Weigh, multiply by down, add up by token.
                hidden[: block.size].mul_(factors[block.rows])
                multiply(hidden, down[block.expert].T, out)
                total.index_add_(0, tokens[block.rows], out[: block.size].to(total.dtype))

        run_on_threads(run_share, shares, act_up, act_gate, sums, buffers)
        ctx.shares, ctx.activation = shares, activation
        ctx.save_for_backward(x, gate, up, down, weight, token, *act_up, *act_gate)
        return _sum_shares(sums).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shares: list[Share] = ctx.shares
        x, gate, up, down, weight, token, *products = ctx.saved_tensors
        act_up, act_gate = products[: len(shares)], products[len(shares) :]
        d_ff = up.shape[1]
        # Gradients of the experts' matrices. An expert that begins in another thread's share is `borrowed`: its
        # gradients here go to matrices of this share's own, and are added to that thread's at the end.
        grads = _ExpertGrads.like(gate, up, down)
        borrowed = [_ExpertGrads.like_one(gate, up, down) if share.blocks[0].borrowed else None for share in shares]
        sums = [x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in shares]
        buffers = [(x.new_zeros(2, share.longest, x.shape[1]), x.new_empty(2, share.longest, d_ff),
                    x.new_empty(min(share.longest, slice_rows(d_ff)), d_ff)) for share in shares]
        grad_weight, factor = torch.empty_like(weight), weight.to(x.dtype).unsqueeze(1)

        def run_share(
            share: Share, act_up: Tensor, act_gate: Tensor | None, grad_x: Tensor,
            buffers: tuple[Tensor, Tensor, Tensor], borrowed: _ExpertGrads | None,
        ) -> None:
            row_buffer, hidden_buffer, slice_buffer = buffers
            tokens, factors, grad_factors = token[share.rows], factor[share.rows], grad_weight[share.rows]
            for block in share.blocks:
                own_tokens, expert, accumulate = tokens[block.rows], block.expert, not block.first
                block_grads = borrowed if borrowed is not None and block.borrowed else grads.take(expert)
                # Gather the rows and their gradients; zeros cancel the rows behind the block.
                rows, grad_out = row_buffer[:, : block.length]
                hidden, grad_hidden = hidden_buffer[:, : block.length]
                torch.index_select(x, 0, own_tokens, out=rows[: block.size])
                torch.index_select(grad, 0, own_tokens, out=grad_out[: block.size])
                grad_out[block.size :] = hidden[block.size :] = 0
                # Down: hidden features again, a few rows at a time, and the gradients of weights and of the matrix.
                multiply(grad_out, down[expert], grad_hidden)
                for part, part_rows in block.slices(d_ff):
                    product = slice_buffer[: part_rows.stop - part_rows.start]
                    if act_gate is None:
                        _activate(ctx.activation, act_up[part_rows], hidden[part])
                    else:
                        _activate(ctx.activation, act_gate[part_rows], hidden[part]).mul_(act_up[part_rows])
                    torch.mul(grad_hidden[part], hidden[part], out=product)
                    torch.sum(product, 1, dtype=weight.dtype, out=grad_factors[part_rows])
                    hidden[part].mul_(factors[part_rows])
                    grad_hidden[part].mul_(factors[part_rows])
                multiply(grad_out.T, hidden, block_grads.down, accumulate)
                # Through the activation, then up and gate. The gradient of the rows takes the place of the output's,
                # that of the gate's product the place of the hidden features; grad_hidden becomes that of up's product.
                grad_rows = grad_out
                if gate is None or act_gate is None or block_grads.gate is None:
                    for part, part_rows in block.slices(d_ff):
                        _activate_backward(ctx.activation, grad_hidden[part], act_up[part_rows], grad_hidden[part])
                    multiply(grad_hidden, up[expert], grad_rows)
                else:
                    grad_act_gate = hidden
                    for part, part_rows in block.slices(d_ff):
                        product = slice_buffer[: part_rows.stop - part_rows.start]
                        torch.mul(grad_hidden[part], act_up[part_rows], out=product)
                        _activate_backward(ctx.activation, product, act_gate[part_rows], grad_act_gate[part])
                        grad_hidden[part].mul_(_activate(ctx.activation, act_gate[part_rows], product))
                    multiply(grad_act_gate.T, rows, block_grads.gate, accumulate)
                    multiply(grad_act_gate, gate[expert], grad_rows)
                    multiply(grad_hidden, up[expert], grad_rows, accumulate=True)
                multiply(grad_hidden.T, rows, block_grads.up, accumulate)
                # Back to the tokens.
                grad_x.index_add_(0, own_tokens, grad_rows[: block.size].to(grad_x.dtype))

        run_on_threads(run_share, shares, act_up, act_gate, sums, buffers, borrowed)
        for share, part in zip(shares, borrowed, strict=True):
            if part is not None:
                grads.take(share.blocks[0].expert).add_(part)
        return _sum_shares(sums).to(x.dtype), grads.gate, grads.up, grads.down, grad_weight, None, None, None


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

    def add_(self, other: _ExpertGrads) -> None:
        for mine, theirs in zip(self, other, strict=True):
            if mine is not None and theirs is not None:
                mine.add_(theirs)


def _sum_shares(sums: list[Tensor]) -> Tensor:
    """Add up all sums in the first of them."""
    for each in sums[1:]:
        sums[0].add_(each)
    return sums[0]


def _activate(name: str, x: Tensor, out: Tensor) -> Tensor:
    """Write act(x) into `out`, which may be x. -> out"""
    if name == "silu":
        return aten.silu.out(x, out=out)
    return aten.gelu.out(x, out=out) if name == "gelu" else torch.clamp_min(x, 0, out=out)


def _activate_backward(name: str, grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Write grad * act'(x) into `out`, which may be grad. -> out"""
    if name == "silu":
        return aten.silu_backward.grad_input(grad, x, grad_input=out)
    if name == "gelu":
        return aten.gelu_backward.grad_input(grad, x, grad_input=out)
    return aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
