"""The fused router and the counting sort against plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moescale.moe.routing import sort_by_expert
from moescale.ops.router import route_reference
from moescale.ops.router_triton import route, rows_by_expert
from tests.ops.interpreted.exact import check

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
    exact = sort_by_expert(expert, torch.zeros(tokens, choices), kept, experts)
    token, row, counts = rows_by_expert(torch.where(kept, expert, -1), experts)
    assert torch.equal(counts, exact.tokens_per_expert)
    assert torch.equal(row, exact.row)
    assert torch.equal(token[: len(exact.token)], exact.token)
