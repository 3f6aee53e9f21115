"""Grouped GEMM, permute and the fused experts against loops."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from moescale.moe.routing import Routing
from moescale.ops import expert_feed_forward_triton
from moescale.ops.expert_feed_forward import expert_feed_forward_reference
from moescale.ops.expert_feed_forward_triton import BACKWARDS, fused_experts
from moescale.ops.grouped_gemm import grouped_gemm_reference
from moescale.ops.grouped_gemm_triton import grouped_gemm
from moescale.ops.permute_triton import permute, unpermute
from tests.support.exact import TOLERANCE, check

QUICK = settings(deadline=None, phases=(Phase.explicit, Phase.generate))  # shrinking would take minutes
DTYPES = st.sampled_from(list(TOLERANCE))


@settings(QUICK, max_examples=8)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.sampled_from([16, 24, 40]), DTYPES)
def test_grouped_gemm(sizes: list[int], d_out: int, dtype: torch.dtype) -> None:
    counts = torch.tensor(sizes)
    torch.manual_seed(d_out)
    rows = torch.randn(sum(sizes), 20, dtype=torch.float64)
    weight = torch.randn(len(sizes), d_out, 20, dtype=torch.float64)
    check(lambda r, w: grouped_gemm(r, w, counts), lambda r, w: grouped_gemm_reference(r, w, counts), [rows, weight],
          [dtype] * 2)


def routing(tokens: int, choices: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a routing with dropped choices. -> token, row, tokens_per_expert"""
    expert = torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)])
    expert = torch.where(torch.rand(expert.shape) < 0.2, experts, expert)
    order = expert.flatten().argsort(stable=True)[: int((expert < experts).sum())]
    row = torch.full((expert.numel(),), -1).scatter(0, order, torch.arange(len(order)))
    return order // choices, row.view_as(expert), torch.bincount(expert.flatten(), minlength=experts + 1)[:experts]


@settings(QUICK, max_examples=8)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(3, 6), DTYPES)
def test_permute_and_unpermute(tokens: int, choices: int, experts: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    token, row, _ = routing(tokens, choices, experts)
    x, weight = torch.randn(tokens, 24, dtype=torch.float64), torch.rand(len(token), dtype=torch.float64)
    check(lambda x, w: unpermute(permute(x, token, row), w, token, row),
          lambda x, w: torch.zeros_like(x).index_add(0, token, x[token] * w.unsqueeze(1)), [x, weight],
          [dtype, torch.float32])


@settings(QUICK, max_examples=8)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(3, 6), DTYPES, st.booleans(),
       st.sampled_from(BACKWARDS))
def test_fused_experts(
    tokens: int, choices: int, experts: int, dtype: torch.dtype, wide: bool, backward: str
) -> None:
    """In bfloat16 of a few tokens at least: of one, the gradient of a weight may be what rounding leaves of a sum."""
    assume(dtype != torch.bfloat16 or tokens > 2)
    torch.manual_seed(tokens)
    token, row, counts = routing(tokens, choices, experts)
    shapes = [(tokens, 24), (experts, 40, 24), (experts, 40, 24), (experts, 24, 40), (len(token),)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]

    def of(function):
        return lambda *x: function(*x[:4], Routing(token=token, weight=x[4], tokens_per_expert=counts, row=row))

    with mock.patch.object(expert_feed_forward_triton, "WIDE", 0 if wide else 1100):
        check(of(partial(fused_experts, backward=backward)),
              of(partial(expert_feed_forward_reference, activation="silu")), inputs, [dtype] * 4 + [torch.float32])
