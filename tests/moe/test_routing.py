"""Routers and capacity against loops written from the papers."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.moe.routers import Router, SigmoidBiasRouter
from moescale.moe.routers.sequence_choice import balanced_plan
from moescale.moe.routing import Routing
from moescale.ops.token_random import uniform
from tests.support.mixtures import KINDS, Kind, make_layer, make_router

LOOPED = [kind for kind in KINDS if kind.name in ("mixtral", "switch", "gshard", "sinkhorn")]


def loop(kind: Kind, router: Router, logits: torch.Tensor, token_id: torch.Tensor) -> tuple[dict, float, float]:
    """Route one sequence token by token. -> {(token, expert): weight}, the balance loss times the tokens, the slots"""
    num_experts, train = router.num_experts, router.training
    valid = [t for t in range(len(logits)) if token_id[t] >= 0]
    probs = logits.softmax(-1).tolist()
    scores = dict(zip(valid, sinkhorn_loop([logits[t].tolist() for t in valid], num_experts), strict=True)
                  if kind.name == "sinkhorn" and train else ((t, logits[t].tolist()) for t in valid))
    tries = kind.own.get("left_behind_choices", kind.top_k)
    ranked = {t: sorted(range(num_experts), key=lambda e, t=t: (-scores[t][e], -probs[t][e], e))[:tries] for t in valid}
    factor = kind.factor if train else kind.capacity.get("eval_factor")
    slots = float("inf")
    if factor is not None:
        slots = max(kind.capacity.get("least", 1), math.floor(factor * (len(valid) * kind.top_k / num_experts)))
    order = valid
    if kind.capacity.get("by_probability"):
        order = sorted(valid, key=lambda t: (-coarse(max(probs[t])), t))
    used, out = [0] * num_experts, {}
    placed = set()  # with stages a token has done with one expert
    for choice in range(tries):
        for t in order:
            expert = ranked[t][choice]
            if t in placed or used[expert] >= slots or (kind.name == "gshard" and choice == 1 and train and not (
                    2 * weigh(kind, logits[t], ranked[t], choice) > float(uniform(token_id[t], router.salt + 1)))):
                continue
            used[expert] += 1
            out[t, expert] = weigh(kind, logits[t], ranked[t], choice)
            if kind.name == "switch":
                placed.add(t)
    counted = 1 if kind.name in ("gshard", "switch") else kind.top_k
    shares = [sum(e in ranked[t][:counted] for t in valid) / (counted * max(1, len(valid))) for e in range(num_experts)]
    balance = num_experts * sum(share * sum(probs[t][e] for t in valid) for e, share in enumerate(shares))
    return out, balance, slots


def weigh(kind: Kind, logits: torch.Tensor, ranked: list[int], choice: int) -> float:
    if kind.name in ("switch", "sinkhorn") or not kind.own.get("normalize_weights", True):
        return float(logits.softmax(-1)[ranked[choice]])
    return float(logits[ranked].softmax(-1)[choice])


def sinkhorn_loop(logits: list[list[float]], num_experts: int) -> list[list[float]]:
    """Scale columns to equal sums and rows to one, in turn (Sinkhorn and Knopp, 1967). -> rounded logarithms"""
    plan = [[math.exp(logit) / sum(map(math.exp, row)) for logit in row] for row in logits]
    for _ in range(20):
        loads = [sum(row[e] for row in plan) for e in range(num_experts)]
        plan = [[row[e] / loads[e] for e in range(num_experts)] for row in plan]
        plan = [[entry / sum(row) for entry in row] for row in plan]
    return [[round(math.log(entry) * 2**12) for entry in row] for row in plan]


def coarse(number: float) -> int:
    """Leave 15 bits of a float32's fraction: what differs by less comes in the order of the tokens."""
    return struct.unpack("<I", struct.pack("<f", number))[0] >> 8


@pytest.mark.parametrize("kind", LOOPED, ids=str)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 3), tokens=st.integers(1, 14), train=st.booleans())
def test_router_equals_the_paper(kind: Kind, seed: int, groups: int, tokens: int, train: bool) -> None:
    torch.manual_seed(seed)
    router = make_router(kind).train(train)
    x = torch.randn(groups, tokens, 8)
    x[:, tokens - tokens // 3 :] = x[:, : tokens // 3].clone()  # equal tokens: the earlier one comes first
    token_id = torch.arange(groups * tokens).view(groups, tokens)
    token_id = torch.where(torch.rand(groups, tokens) < 0.2, -1, token_id)
    logits = torch.nn.functional.linear(x, router.weight.detach())
    result = router(x, token_id)
    experts = torch.arange(5).repeat_interleave(result[0].tokens_per_expert)
    expected, balance = {}, 0.0
    for group in range(groups):
        out, loss, slots = loop(kind, router, logits[group], token_id[group])
        expected.update({(group * tokens + t, e): w for (t, e), w in out.items()})
        balance += loss
        assert int(experts[result[0].token // tokens == group].bincount(minlength=5).max()) <= slots
    check(result, expected, balance)
    valid = token_id >= 0
    assert len(expected) + int(router.dropped(result[0], valid)) == int(valid.sum()) * kind.top_k


def check(result: tuple[Routing, torch.Tensor], expected: dict[tuple[int, int], float], balance: float) -> None:
    routing, losses = result
    experts = torch.arange(len(routing.tokens_per_expert)).repeat_interleave(routing.tokens_per_expert).tolist()
    got = dict(zip(zip(routing.token.tolist(), experts, strict=True), routing.weight.tolist(), strict=True))
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, abs=1e-5)
    assert losses[0].item() == pytest.approx(balance, rel=1e-4, abs=1e-5)
    rows = [(t, r) for t, choices in enumerate(routing.row.tolist()) for r in choices if r >= 0]
    assert sorted(r for _, r in rows) == list(range(len(routing.token)))
    assert all(int(routing.token[r]) == t for t, r in rows)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 12), top_k=st.integers(1, 4),
       groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 3), (8, 4)]))
def test_sigmoid_bias_equals_the_paper(seed: int, tokens: int, top_k: int, groups: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    own = {"num_expert_groups": groups[0], "top_k_groups": groups[1], "routed_scaling": 2.5}
    router = make_router(Kind("sigmoid_bias", top_k, own=own), 8)
    router.expert_bias.normal_(std=0.3)
    x, token_id = torch.randn(1, tokens, 8), torch.arange(tokens).view(1, tokens)
    token_id = torch.where(torch.rand(1, tokens) < 0.2, -1, token_id)
    expected, probs, chosen = {}, [], [0] * 8
    for t in (t for t in range(tokens) if token_id[0, t] >= 0):
        score = (x[0, t] @ router.weight.detach().T).sigmoid().tolist()
        biased = [s + b for s, b in zip(score, router.expert_bias.tolist(), strict=True)]
        size = 8 // groups[0]
        parts = [range(first, first + size) for first in range(0, 8, size)]
        parts.sort(key=lambda part: -sum(sorted((biased[e] for e in part), reverse=True)[: max(1, top_k // groups[1])]))
        best = sorted((e for part in parts[: groups[1]] for e in part), key=lambda e: -biased[e])[:top_k]
        for e in best:
            expected[t, e] = 2.5 * score[e] / sum(score[e] for e in best)
        for e in sorted(range(8), key=lambda e: -score[e])[:top_k]:  # eq. 18 knows neither bias nor groups
            chosen[e] += 1
        probs.append([s / sum(score) for s in score])
    balance = sum(8 * chosen[e] / (top_k * len(probs)) * sum(p[e] for p in probs) for e in range(8)) if probs else 0.0
    check(router(x, token_id), expected, balance)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 3), tokens=st.integers(1, 14), train=st.booleans(),
       factor=st.sampled_from([0.3, 1.0, 1.7, 2.4, 5.0]))
def test_expert_choice_equals_the_paper(seed: int, groups: int, tokens: int, train: bool, factor: float) -> None:
    torch.manual_seed(seed)
    top_k = max(1, round(factor))
    layer = make_layer(Kind("expert_choice", top_k, factor)).train(train)
    x = torch.randn(groups, tokens, 8)
    x[:, tokens // 2 :] = x[:, : tokens - tokens // 2].clone()  # equal tokens: the earlier one comes first
    token_id = torch.arange(groups * tokens).view(groups, tokens)
    token_id = torch.where(torch.rand(groups, tokens) < 0.2, -1, token_id)
    expected, valid = {}, (token_id >= 0).tolist()
    probs = (x @ layer.router.weight.detach().T).softmax(-1)
    for group in range(groups):
        own = [t for t in range(tokens) if valid[group][t]]
        score = {(t, e): math.frexp(float(probs[group, t, e])) for t in own for e in range(5)}
        score = {key: math.floor(m * 2**16) * 2.0**power for key, (m, power) in score.items()}  # 16 bits are compared
        slots = max(1, int(factor * len(own) / 5))
        taken = [(t, e) for e in range(5) for t in sorted(own, key=lambda t, e=e: (-score[t, e], t))[:slots]]
        chosen = [(t, e) for t in own for e in probs[group, t].argsort(descending=True, stable=True)[:top_k].tolist()]
        expected.update({(group * tokens + t, e): float(probs[group, t, e]) for t, e in (taken if train else chosen)})
    check(layer.router(x, token_id), expected, 0.0)
    layer(x, token_id)
    left = sum(map(sum, valid)) - len({token for token, _ in expected})
    assert int(layer.statistics.dropped) == (left if train else 0)


def test_sinkhorn_balances_what_is_skewed_and_no_bias_of_an_expert_moves_it() -> None:
    torch.manual_seed(5)
    router = make_router(Kind("sinkhorn", 1), num_experts=4)
    x, token_id = torch.randn(2, 64, 8), torch.arange(128).view(2, 64)
    x[..., 0] = 1
    with torch.no_grad():
        router.weight[:, 0] = torch.tensor([0.0, 0.0, 0.0, 3.0])
    routing, skewed = router(x, token_id)[0], router.eval()(x, token_id)[0]
    assert int(skewed.tokens_per_expert.max()) > 80
    assert int(routing.tokens_per_expert.max()) <= 40, "even: 32 each"
    probs = torch.nn.functional.linear(x, router.weight).softmax(-1).flatten(0, 1)
    assert skewed.tokens_per_expert.tolist() == probs.argmax(-1).bincount(minlength=4).tolist()
    expert = torch.arange(4).repeat_interleave(routing.tokens_per_expert)
    torch.testing.assert_close(routing.weight, probs[routing.token, expert])  # raw, with their gradient
    assert routing.weight.requires_grad
    with torch.no_grad():
        router.weight[:, 0] = torch.tensor([1.0, -1.0, 0.5, 0.0])
    assert torch.equal(router.train()(x, token_id)[0].token, routing.token)


def test_sinkhorn_without_preference_takes_the_tokens_own_best_whatever_the_rounding_error() -> None:
    torch.manual_seed(6)
    router = make_router(Kind("sinkhorn", 2))
    logits = torch.randn(20, 1, 5).repeat(1, 7, 1)  # equal tokens: an even plan
    best = logits.argsort(-1, descending=True)[..., :2]
    for noise in (0.0, 1e-6):
        plan = balanced_plan(logits + noise * torch.rand_like(logits), torch.ones(20, 7, dtype=torch.bool))
        assert torch.equal(router.choose(plan, logits.softmax(-1))[0], best)


def test_bias_moves_against_the_load_alone() -> None:
    router = make_router(Kind("sigmoid_bias", 2), 4)
    assert isinstance(router, SigmoidBiasRouter)
    router.balance(torch.tensor([7, 2, 4, 3]))
    assert router.expert_bias.tolist() == pytest.approx([-0.001, 0.001, 0, 0.001])
    router.balance(torch.tensor([2, 0, 0, 0]))
    assert router.expert_bias.tolist() == pytest.approx([-0.002, 0.002, 0.001, 0.002])
    assert not any("bias" in name for name, _ in router.named_parameters())


def test_equal_logits_take_the_lowest_experts() -> None:
    router = make_router(Kind("mixtral", 2))
    torch.nn.init.zeros_(router.weight)
    routing, losses = router(torch.randn(1, 10, 8), torch.arange(10).view(1, 10))
    assert routing.tokens_per_expert.tolist() == [10, 10, 0, 0, 0]
    assert float(losses[0]) == pytest.approx(10)  # uniform probabilities: one a token
