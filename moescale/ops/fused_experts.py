"""A whole mixture of SwiGLU experts in a few kernels, on a GPU."""

from __future__ import annotations

from torch import Tensor


def fused_experts(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weight: Tensor, token: Tensor, row: Tensor,
    tokens_per_expert: Tensor,
) -> Tensor:
    """Equal `unpermute(expert_feed_forward(permute(x)), weight)` with silu and gate, without a permuted copy of x.

    x: [tokens, d_model]. gate, up: [experts, d_ff, d_model]. down: [experts, d_model, d_ff]. All of one dtype.
    weight: [assignments] float32. token, row, tokens_per_expert: as in `Routing`. -> like x
    Only where `triton_runs`.
    """
    from moescale.ops import fused_experts_triton

    return fused_experts_triton.fused_experts(x, gate, up, down, weight, token, row, tokens_per_expert)
