"""The fused router and the counting sort against plain torch, and a router with both against one without."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moescale.moe.balance_scopes import SCOPES
from moescale.moe.routers import Capacity, token_choice
from moescale.moe.routers.token_choice import MixtralRouter
from moescale.ops import router as ops_router
from moescale.ops.router import route_reference, rows_by_expert_reference
from moescale.ops.router_triton import route, rows_by_expert
from tests.support.exact import check

QUICK = settings(deadline=None, phases=(Phase.explicit, Phase.generate))  # shrinking would take minutes


@settings(QUICK, max_examples=6)
@given(st.integers(1, 2), st.integers(1, 70), st.sampled_from([(1, 1), (6, 2), (8, 8), (130, 3)]), st.booleans())
def test_choices_weights_and_sums(groups: int, tokens: int, sizes: tuple[int, int], normalised: bool) -> None:
    torch.manual_seed(tokens)
    (experts, top_k), valid = sizes, torch.rand(groups, tokens) < 0.8
    logits = (torch.randn(groups, tokens, experts) * 3).double()
    chosen = []

    def of(function):
        def call(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
            weight, probs, z, expert, assignments = function(logits, valid, top_k, normalised)
            chosen.append((expert, assignments))
            return weight, probs, z

        return call

    check(of(route), of(route_reference), [logits], [torch.float32])
    for ours, exact in zip(*chosen, strict=True):
        assert torch.equal(ours, exact)


def test_the_lower_number_among_equals() -> None:
    logits = torch.tensor([[[1.0, 2.0, 2.0, 2.0, -1e4], [0.0, 0.0, 0.0, 0.0, 0.0]]])
    weight, *_, expert, _ = route(logits, torch.ones(1, 2, dtype=torch.bool), 2, True)
    assert expert.tolist() == [[[1, 2], [0, 1]]]
    assert weight.tolist() == [[[0.5, 0.5], [0.5, 0.5]]]


@pytest.mark.parametrize(("tokens", "choices", "experts"), [(90, 2, 5), (1, 1, 1), (7, 3, 200), (0, 2, 4)])
def test_rows_are_those_of_a_stable_sort(tokens: int, choices: int, experts: int) -> None:
    torch.manual_seed(tokens)
    expert, kept = torch.randint(experts, (tokens, choices)), torch.rand(tokens, choices) < 0.8
    expert = torch.where(kept, expert, -1)
    order, row, counts = rows_by_expert(expert, experts)
    exact_order, exact_row, exact_counts = rows_by_expert_reference(expert, experts)
    assert torch.equal(counts, exact_counts)
    assert torch.equal(row, exact_row)
    assert torch.equal(order[: counts.sum()], exact_order[: counts.sum()])


@settings(QUICK, max_examples=4)
@given(st.integers(1, 2), st.integers(1, 40), st.sampled_from([(1, 1), (6, 2), (20, 8)]), st.sampled_from([*SCOPES]),
       st.booleans())
def test_a_router_with_the_kernels_equals_one_without(
    groups: int, tokens: int, sizes: tuple[int, int], balance_over: str, normalize_weights: bool
) -> None:
    torch.manual_seed(tokens)
    router = MixtralRouter(8, *sizes, capacity=Capacity(), balance_over=balance_over, jitter=0.0, salt=0,
                           normalize_weights=normalize_weights)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(groups, tokens, 8, requires_grad=True)
    token_id = torch.where(torch.rand(groups, tokens) < 0.8, torch.arange(groups * tokens).view(groups, tokens), -1)
    results: list[tuple[torch.Tensor, ...]] = []
    looks: list[torch.Tensor] = []
    router.observe(lambda probs, valid: looks.append(probs.detach() * valid.unsqueeze(-1)))
    for runs in (False, True):
        with mock.patch.object(token_choice, "triton_runs", lambda x, runs=runs: runs), \
             mock.patch.object(ops_router, "triton_runs", lambda x, runs=runs: runs):
            routing, losses = router(x, token_id)
        torch.manual_seed(0)
        total = (routing.weight * torch.randn(routing.weight.shape)).sum() + (losses * torch.tensor([0.1, 0.01])).sum()
        results.append((routing.token, routing.row, routing.tokens_per_expert, routing.weight.detach(), losses.detach(),
                        *torch.autograd.grad(total, (x, router.weight))))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*looks)
