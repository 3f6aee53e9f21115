"""The experts' feed-forward over all tokens of a rank: each token's outputs are weighed and added up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.device import triton_runs
from moescale.ops.expert_feed_forward_blocks import feed_forward_in_blocks
from moescale.ops.grouped_gemm import grouped_gemm, grouped_gemm_reference
from moescale.ops.permute import permute, unpermute
from moescale.ops.product import linear

FEW = 128  # rows up to which a processor computes without blocks and threads of our own
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class Assignments(Protocol):
    """The fields of a Routing that this file needs: which token goes to which expert.

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
    """Sum weight * down(act(gate x) * up x) over each token's experts, or weight * down(act(up x)) without gate.

    The weight is applied to the hidden features, so that the experts' outputs need not be kept for its gradient.
    x: [tokens, d_model]. gate, up: [experts, d_ff, d_model]. down: [experts, d_model, d_ff]. All of one dtype.
    activation: silu, gelu or relu. keep: [assignments, d_ff], factors of the hidden features (dropout).
    -> like x; sums in float32, and zeros for a token without experts
    """
    if x.device.type == "cpu" and keep is None:
        sizes = routing.tokens_per_expert.tolist()
        if len(routing.token) <= FEW and not torch.is_grad_enabled():
            return _few(x, gate, up, down, routing, sizes, ACTIVATIONS[activation])
        return feed_forward_in_blocks(x, gate, up, down, routing.weight, routing.token, sizes, activation)
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


def _few(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, routing: Assignments, sizes: list[int],
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """Do the same expert by expert, of rows so few that their products are all the work there is."""
    rows, weights = x.index_select(0, routing.token), routing.weight.to(x.dtype).unsqueeze(1)
    answers, start = [], 0
    for expert, size in enumerate(sizes):
        if size:
            these = slice(start, start := start + size)
            hidden = linear(rows[these], up[expert])
            hidden = act(hidden) if gate is None else act(linear(rows[these], gate[expert])).mul_(hidden)
            answers.append(linear(hidden.mul_(weights[these]), down[expert]))
    total = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    if answers:
        total.index_add_(0, routing.token, torch.cat(answers).to(total.dtype))
    return total.to(x.dtype)


def expert_feed_forward_reference(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, routing: Assignments, activation: str
) -> Tensor:
    """Compute the same with loops over experts and autograd alone."""
    rows, act = x[routing.token], ACTIVATIONS[activation]
    hidden = grouped_gemm_reference(rows, up, routing.tokens_per_expert)
    if gate is None:
        hidden = act(hidden)
    else:
        hidden = act(grouped_gemm_reference(rows, gate, routing.tokens_per_expert)) * hidden
    rows = grouped_gemm_reference(hidden, down, routing.tokens_per_expert)
    return torch.zeros_like(x).index_add(0, routing.token, rows * routing.weight.unsqueeze(1).to(rows.dtype))
