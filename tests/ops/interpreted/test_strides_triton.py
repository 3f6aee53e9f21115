"""Where the numbers of a tensor lie in memory changes nothing that a kernel computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from moescale.moe.routing import Routing
from moescale.ops import head_losses as module
from moescale.ops.attention import attention
from moescale.ops.expert_feed_forward_triton import BACKWARDS, fused_experts
from moescale.ops.grouped_gemm_triton import grouped_gemm
from moescale.ops.head_losses import head_losses
from moescale.ops.permute_triton import permute, unpermute
from moescale.ops.rms_norm_triton import rms_norm
from moescale.ops.rotary_triton import rotate
from moescale.ops.router_triton import route, rows_by_expert
from moescale.ops.scan_triton import selective_scan

TOKENS, CHOICES, EXPERTS = 90, 2, 3  # several tiles of rows an expert
Case = tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]


def lie_apart(x: Tensor) -> Tensor:
    """Make the same a part of something wider, with other numbers between."""
    if x.ndim < 2:
        return torch.stack((x, -x), -1)[..., 0]
    other = torch.full_like(x, torch.nan) if x.is_floating_point() else -1 - x.long()
    return torch.cat((x, other.to(x.dtype)), -1)[..., : x.shape[-1]]


def cases() -> dict[str, Case]:
    randn, rand, ints = torch.randn, torch.rand, torch.randint
    expert = torch.stack([torch.randperm(EXPERTS)[:CHOICES] for _ in range(TOKENS)])
    order = expert.flatten().argsort(stable=True)
    token, row = order // CHOICES, order.argsort().view(TOKENS, CHOICES)
    counts, weight = torch.bincount(expert.flatten(), minlength=EXPERTS), rand(len(order))
    matrices = [randn(EXPERTS, 72, 16), randn(EXPERTS, 72, 16), randn(EXPERTS, 16, 72)]

    def experts(backward: str, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *others: Tensor) -> Tensor:
        weight, token, row = others
        return fused_experts(x, gate, up, down, Routing(token, weight, counts, row), backward=backward)

    return {
        **{f"experts, {backward}": (partial(experts, backward), [randn(TOKENS, 16), *matrices, weight, token, row])
           for backward in BACKWARDS},
        "grouped_gemm": (lambda rows, w: grouped_gemm(rows, w, counts), [randn(len(order), 16), matrices[0]]),
        "permute": (permute, [randn(TOKENS, 24), token, row]),
        "unpermute": (unpermute, [randn(len(order), 24), weight, token, row]),
        "route": (lambda x, valid: route(x, valid, 2, True), [randn(2, 9, 6), rand(2, 9) < 0.8]),
        "rows_by_expert": (lambda x: rows_by_expert(x, 5), [ints(5, (9, 2))]),
        "norm": (lambda x, w: rms_norm(x, w, 1e-3), [randn(7, 24), rand(24)]),
        "rotate": (lambda x, c, s: rotate(x, c.detach(), s.detach(), 1), [
            randn(2, 5, 3, 16), randn(2, 5, 1, 8), randn(2, 5, 1, 8)]),
        "losses": (lambda x, w, y: head_losses(x, w, y, chunk=5), [randn(12, 16), randn(37, 16), ints(37, (12,))]),
        "scan": (selective_scan, [
            randn(2, 9, 3), rand(2, 9, 3), -rand(3, 4), randn(2, 9, 4), randn(2, 9, 4), randn(3)]),
        "attention": (
            lambda q, k, v, slopes, positions: attention(
                q, k, v, alibi_slopes=slopes.detach(), positions=positions, backend="triton"),
            [*randn(3, 1, 20, 2, 16), rand(2), (torch.arange(20) % 11).view(1, 20)]),
    }


@pytest.mark.parametrize("name", cases())
def test_strides_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    function, inputs = cases()[name]
    results = []
    for place in (lambda x: x, lie_apart):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        with mock.patch.object(module, "triton_runs", return_value=True):
            out = function(*map(place, leaves))
            outs = list(out) if isinstance(out, tuple) else [out]
            torch.manual_seed(1)
            ends = {x: place(torch.randn_like(x)) for x in outs if x.requires_grad}
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            grads = torch.autograd.grad(list(ends), wanted, list(ends.values()), allow_unused=True) if ends else ()
        results.append([*outs, *grads])
    for own, apart in zip(*results, strict=True):
        assert (own is None and apart is None) or torch.equal(own, apart)
