"""A whole mixture of SwiGLU experts on one GPU: rows are gathered while loading, outputs weighed and added up."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moescale.ops.descriptors_triton import padded, unpadded
from moescale.ops.expert_feed_forward import Assignments
from moescale.ops.expert_gradients_triton import grad_matrices, grad_through_activation
from moescale.ops.grouped_gemm_triton import grad_weight, multiply, multiply_swiglu
from moescale.ops.permute_triton import sum_of_rows

BLOCK = 1024
BACKWARDS = ("multiplies", "activates", "gathers")
WIDE = 1100  # d_model d_ff / (d_model + d_ff) from which products outweigh a copy of the rows; measured on an H200


def fused_experts(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, routing: Assignments, *, backward: str = BACKWARDS[0]
) -> Tensor:
    """Compute `ops.expert_feed_forward.expert_feed_forward` with silu and a gate; bfloat16, float16 or float32.

    x: [tokens, d_model]. gate, up: [experts, d_ff, d_model]. down: [experts, d_model, d_ff]. backward: what its
    products do; "activates": the activation too, "gathers": that, and they gather rows. Of these no device has timed
    another than the first yet; tools/gpu_check.py times all. -> like x
    """
    assert backward in BACKWARDS
    out = _FusedExperts.apply(
        padded(x), padded(gate, 2), padded(up, 2), padded(down, 2), routing.weight.contiguous(),
        routing.token.contiguous(), routing.row, routing.tokens_per_expert, backward,
    )
    return unpadded(out, x.shape[1])


class _FusedExperts(torch.autograd.Function):
    """Keeps x and the two products of each row for backward, which computes the hidden features again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weight: Tensor, token: Tensor, row: Tensor,
        tokens_per_expert: Tensor, backward: str,
    ) -> Tensor:
        hidden, act_gate, act_up = _hidden(x, gate, up, tokens_per_expert, token)
        rows = multiply(hidden, down, tokens_per_expert, scale=weight)
        ctx.save_for_backward(x, gate, up, down, weight, token, row, tokens_per_expert, act_gate, act_up)
        ctx.products = backward
        return sum_of_rows(rows, None, row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if ctx.products != "multiplies":
            return *_fused_backward(grad, *saved, gathers=ctx.products == "gathers"), None, None, None, None
        x, gate, up, down, weight, token, row, counts, act_gate, act_up = saved
        # Down: the gradient of the hidden features, not weighed yet, for the gradient of the weights needs it so.
        grad_rows = grad.index_select(0, token)  # one copy, which both products load faster than if each gathered
        grad_hidden = multiply(grad_rows, down.mT, counts)
        # The activation: hidden features again, and the gradients of both products; that of the gate's overwrites
        # the gradient of the hidden features.
        hidden, grad_act_up, grad_scale = torch.empty_like(act_gate), torch.empty_like(act_up), torch.empty_like(weight)
        if len(token):
            _swiglu_backward[(len(token),)](
                grad_hidden, act_gate, act_up, weight, hidden, grad_act_up, grad_scale, act_gate.shape[1], BLOCK=BLOCK,
                num_warps=4, num_stages=1,
            )
        grad_act_gate = grad_hidden
        # The experts' matrices; rows are let go as soon as they are no longer needed.
        grad_down = grad_weight(grad_rows, hidden, counts)
        del grad_rows, hidden
        x_rows = x.index_select(0, token)
        grad_gate, grad_up = grad_weight(grad_act_gate, x_rows, counts), grad_weight(grad_act_up, x_rows, counts)
        del x_rows
        # Gate and up together, back to the tokens.
        rows = multiply(grad_act_gate, gate.mT, counts, second=(grad_act_up, up.mT))
        grads = grad_gate, grad_up, grad_down, grad_scale
        return sum_of_rows(rows, None, row), *grads, None, None, None, None


def _fused_backward(
    grad: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weight: Tensor, token: Tensor, row: Tensor,
    counts: Tensor, act_gate: Tensor, act_up: Tensor, *, gathers: bool,
) -> tuple[Tensor, ...]:
    """Compute the gradients of x, of the matrices and of weight by products that activate. gathers: and gather"""
    index = token if gathers else None
    grad_rows = grad if index is not None else grad.index_select(0, token)
    hidden, grad_acts, grad_scale = grad_through_activation(
        grad_rows, index, down, act_gate, act_up, weight, counts)
    if index is not None:
        (grad_down,) = grad_matrices(grad.unsqueeze(0), hidden, counts, left_token=index)
        grad_gate, grad_up = grad_matrices(grad_acts, x, counts, right_token=index)
    else:
        grad_down = grad_weight(grad_rows, hidden, counts)
        del grad_rows, hidden
        x_rows = x.index_select(0, token)
        grad_gate, grad_up = (grad_weight(each, x_rows, counts) for each in grad_acts)
        del x_rows
    rows = multiply(grad_acts[0], gate.mT, counts, second=(grad_acts[1], up.mT))
    return sum_of_rows(rows, None, row), grad_gate, grad_up, grad_down, grad_scale


def _hidden(x: Tensor, gate: Tensor, up: Tensor, tokens_per_expert: Tensor, token: Tensor) -> tuple[Tensor, ...]:
    """Compute `multiply_swiglu`, of wide experts in three passes over a copy of the rows, which TMA can load."""
    d_ff, d_model = gate.shape[1:]
    if d_model * d_ff < WIDE * (d_model + d_ff):
        return multiply_swiglu(x, gate, up, tokens_per_expert, token)
    rows = x.index_select(0, token)
    act_gate, act_up = multiply(rows, gate, tokens_per_expert), multiply(rows, up, tokens_per_expert)
    hidden = torch.empty_like(act_gate)
    if len(token):
        _swiglu[(len(token),)](act_gate, act_up, hidden, d_ff, BLOCK=BLOCK, num_warps=4, num_stages=1)
    return hidden, act_gate, act_up


@triton.jit
def _swiglu(Gate, Up, Hidden, D, BLOCK: tl.constexpr):
    """Compute one row of silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        offset, mask = row * D + column, column < D
        gate = tl.load(Gate + offset, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(Up + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(Hidden + offset, (gate * tl.sigmoid(gate) * up).to(Hidden.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(
    GradHidden, Gate, Up, Weight, Hidden, GradUp, GradWeight, D, BLOCK: tl.constexpr
):
    """Compute one row's hidden features, weighed, and the gradients of both products and of the row's weight.

    The gradient of the gate's product replaces that of the hidden features.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(Weight + row)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        offset, mask = row * D + column, column < D
        grad = tl.load(GradHidden + offset, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(Gate + offset, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(Up + offset, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        hidden = gate * sigmoid * up
        product += grad * hidden
        grad *= weight
        slope = sigmoid * (1 + gate * (1 - sigmoid))  # of silu
        tl.store(Hidden + offset, (hidden * weight).to(Hidden.dtype.element_ty), mask=mask)
        tl.store(GradHidden + offset, (grad * up * slope).to(Hidden.dtype.element_ty), mask=mask)
        tl.store(GradUp + offset, (grad * gate * sigmoid).to(Hidden.dtype.element_ty), mask=mask)
    tl.store(GradWeight + row, tl.sum(product))
