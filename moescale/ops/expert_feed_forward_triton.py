"""A whole mixture of SwiGLU experts on one device: rows gathered while loading, weighed and added up on the way out."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moescale.ops.descriptors_triton import padded, unpadded
from moescale.ops.expert_feed_forward import Assignments
from moescale.ops.grouped_gemm_triton import grad_weight, multiply, multiply_swiglu
from moescale.ops.permute_triton import sum_of_rows

BLOCK = 1024
WIDE = 1100  # where products outweigh what is copied beside them: d_model d_ff / (d_model + d_ff), measured on an H200


def fused_experts(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, routing: Assignments) -> Tensor:
    """As `ops.expert_feed_forward.expert_feed_forward` with silu and a gate; bfloat16, float16 or float32. -> like x"""
    out = _FusedExperts.apply(
        padded(x), padded(gate, 2), padded(up, 2), padded(down, 2), routing.weight, routing.token, routing.row,
        routing.tokens_per_expert,
    )
    return unpadded(out, x.shape[1])


class _FusedExperts(torch.autograd.Function):
    """Kept for backward: x and the two products of each row. The hidden features are computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weight: Tensor, token: Tensor, row: Tensor,
        tokens_per_expert: Tensor,
    ) -> Tensor:
        hidden, of_gate, of_up = _hidden(x, gate, up, tokens_per_expert, token)
        rows = multiply(hidden, down, tokens_per_expert, scale=weight)
        ctx.save_for_backward(x, gate, up, down, weight, token, row, tokens_per_expert, of_gate, of_up)
        return sum_of_rows(rows, None, row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down, weight, token, row, counts, of_gate, of_up = ctx.saved_tensors
        grad_rows = grad.index_select(0, token)  # one copy, which both products load faster than if each gathered
        grad_hidden = multiply(grad_rows, down.mT, counts)  # not weighed yet: the weight's gradient needs it so
        hidden, grad_of_up, of_weight = torch.empty_like(of_gate), torch.empty_like(of_up), torch.empty_like(weight)
        if len(token):
            _swiglu_backward[(len(token),)](
                grad_hidden, of_gate, of_up, weight, hidden, grad_of_up, of_weight, of_gate.shape[1], BLOCK=BLOCK,
                num_warps=4, num_stages=1,
            )
        grad_of_gate = grad_hidden  # which it has become
        of_down = grad_weight(grad_rows, hidden, counts)
        del grad_rows, hidden
        x_rows = x.index_select(0, token)
        weights = grad_weight(grad_of_gate, x_rows, counts), grad_weight(grad_of_up, x_rows, counts), of_down
        del x_rows
        rows = multiply(grad_of_gate, gate.mT, counts, second=(grad_of_up, up.mT))
        return sum_of_rows(rows, None, row), *weights, of_weight, None, None, None


def _hidden(x: Tensor, gate: Tensor, up: Tensor, tokens_per_expert: Tensor, token: Tensor) -> tuple[Tensor, ...]:
    """-> as `multiply_swiglu`: in one pass or, of wide experts, in three over a copy of the rows, which TMA can load"""
    d_ff, d_model = gate.shape[1:]
    if d_model * d_ff < WIDE * (d_model + d_ff):
        return multiply_swiglu(x, gate, up, tokens_per_expert, token)
    rows = x.index_select(0, token)
    of_gate, of_up = multiply(rows, gate, tokens_per_expert), multiply(rows, up, tokens_per_expert)
    hidden = torch.empty_like(of_gate)
    if len(token):
        _swiglu[(len(token),)](of_gate, of_up, hidden, d_ff, BLOCK=BLOCK, num_warps=4, num_stages=1)
    return hidden, of_gate, of_up


@triton.jit
def _swiglu(Gate, Up, Hidden, D, BLOCK: tl.constexpr):
    """One row of silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at, mask = row * D + column, column < D
        gate = tl.load(Gate + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(Up + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(Hidden + at, (gate * tl.sigmoid(gate) * up).to(Hidden.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(
    GradHidden, Gate, Up, Weight, Hidden, GradUp, GradWeight, D, BLOCK: tl.constexpr
):
    """One row: its hidden features, weighed; the gradients of both products, that of the gate's in place of the hidden
    features', and of the row's weight.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(Weight + row)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at, mask = row * D + column, column < D
        grad = tl.load(GradHidden + at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(Gate + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(Up + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        hidden = gate * sigmoid * up
        product += grad * hidden
        grad *= weight
        slope = sigmoid * (1 + gate * (1 - sigmoid))  # of silu
        tl.store(Hidden + at, (hidden * weight).to(Hidden.dtype.element_ty), mask=mask)
        tl.store(GradHidden + at, (grad * up * slope).to(Hidden.dtype.element_ty), mask=mask)
        tl.store(GradUp + at, (grad * gate * sigmoid).to(Hidden.dtype.element_ty), mask=mask)
    tl.store(GradWeight + row, tl.sum(product))
