"""Steps between the products of experts on a processor: gather rows, activate, add up by token.

Each is one pass of a compiled function where `native` runs, and a few operations of torch elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moescale.ops import native
from moescale.ops.shares import slice_rows

aten = torch.ops.aten


def gather_rows(x: Tensor, token: Tensor, out: Tensor) -> None:
    """Copy the rows of these tokens. x: [tokens, width]. token: [rows]. out: [rows, width]."""
    if native.runs(x):
        native.call("gather", x.dtype, native.parts(*out.shape), x, token, *out.shape, out)
    else:
        torch.index_select(x, 0, token, out=out)


def add_rows(total: Tensor, token: Tensor, rows: Tensor) -> None:
    """Add each row to its token's sum.

    total: [tokens, width], float32 at least. token: [rows], none twice. rows: [rows, width].
    """
    if native.runs(rows):
        native.call("add", rows.dtype, native.parts(*rows.shape), rows, token, *rows.shape, total)
    else:
        total.index_add_(0, token, rows.to(total.dtype))


def activate(name: str, gate: Tensor | None, up: Tensor, factor: Tensor, hidden: Tensor) -> None:
    """Write act(gate) * up * factor, or act(up) * factor without gate.

    name: silu, gelu or relu. gate, up: [rows, d_ff], each row contiguous, of the same strides. factor: [rows] float32.
    hidden: [rows, d_ff].
    """
    if gate is not None and name == "silu" and native.runs(up):
        native.call("activate", up.dtype, native.parts(*up.shape), gate, up, up.stride(0), factor, *up.shape, hidden)
    elif gate is None:
        _activate(name, up, hidden).mul_(factor.unsqueeze(1).to(up.dtype))
    else:
        _activate(name, gate, hidden).mul_(up).mul_(factor.unsqueeze(1).to(up.dtype))


def activate_backward(
    name: str, gate: Tensor | None, up: Tensor, factor: Tensor, grad_hidden: Tensor, hidden: Tensor,
    grad_gate: Tensor | None, grad_up: Tensor, grad_factor: Tensor,
) -> None:
    """Write the gradients of `activate`, and `hidden` again. grad_hidden: [rows, d_ff], destroyed. grad_factor: [rows].

    The rest is as there; the gradients of gate and up may have other strides than these, but one of them both.
    """
    if gate is not None and grad_gate is not None and name == "silu" and native.runs(up):
        native.call("activate_backward", up.dtype, native.parts(*up.shape), gate, up, up.stride(0), factor,
                    grad_hidden, *up.shape, hidden, grad_gate, grad_up, grad_up.stride(0), grad_factor)
        return
    rows = slice_rows(up.shape[1])  # a few at a time, for the cache
    buffer = up.new_empty(2, min(rows, len(up)), up.shape[1])
    for begin in range(0, len(up), rows):
        part = slice(begin, min(begin + rows, len(up)))
        own_up, own_grad, own_hidden = up[part], grad_hidden[part], hidden[part]
        activated, product = buffer[:, : part.stop - begin]
        if gate is None:
            _activate(name, own_up, own_hidden)
        else:
            _activate(name, gate[part], activated)
            torch.mul(activated, own_up, out=own_hidden)
        torch.mul(own_grad, own_hidden, out=product)
        torch.sum(product, 1, dtype=grad_factor.dtype, out=grad_factor[part])
        factors = factor[part].unsqueeze(1).to(up.dtype)
        own_hidden.mul_(factors)
        own_grad.mul_(factors)
        if gate is None or grad_gate is None:
            _activate_backward(name, own_grad, own_up, grad_up[part])
        else:
            torch.mul(own_grad, activated, out=grad_up[part])
            torch.mul(own_grad, own_up, out=product)
            _activate_backward(name, product, gate[part], grad_gate[part])


def _activate(name: str, x: Tensor, out: Tensor) -> Tensor:
    """Write act(x) into `out`. -> out"""
    if name == "silu":
        return aten.silu.out(x, out=out)
    return aten.gelu.out(x, out=out) if name == "gelu" else torch.clamp_min(x, 0, out=out)


def _activate_backward(name: str, grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Write grad * act'(x) into `out`. -> out"""
    if name == "silu":
        return aten.silu_backward.grad_input(grad, x, grad_input=out)
    if name == "gelu":
        return aten.gelu_backward.grad_input(grad, x, grad_input=out)
    return aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
