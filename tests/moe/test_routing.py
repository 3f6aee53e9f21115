"""Routers and capacity against loops written from the papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.layers.feed_forward import FeedForward
from moescale.moe.experts import Experts
from moescale.moe.layer import MoELayer
from moescale.moe.routers import ROUTERS, Capacity, Router, SigmoidBiasRouter
from moescale.moe.routing import Routing
from moescale.ops.random import uniform

CASES = [
    ("mixtral", 2, None), ("mixtral", 3, None), ("switch", 1, 0.7), ("switch", 1, 1.25), ("gshard", 2, 0.6),
    ("gshard", 2, 2.0),
]
ALL = [*CASES, ("sigmoid_bias", 2, None), ("expert_choice", 2, 1.7)]


def make_router(
    name: str, top_k: int, capacity_factor: float | None, num_experts: int = 5, d_model: int = 8, **own: Any
) -> Router:
    own = {"balance_over": "sequence", **own}
    if name == "switch":
        own = {"left_behind_choices": 1, **own}
    if name == "sigmoid_bias":
        own = {"num_expert_groups": 1, "top_k_groups": 1, "routed_scaling": 1.0, "bias_update_rate": 0.001, **own}
    router = ROUTERS[name](
        d_model, num_experts, top_k, capacity=Capacity(capacity_factor), jitter=0.0, salt=6, init="fan_in", **own
    )
    torch.nn.init.normal_(router.weight)
    return router


def loop(router: Router, x: torch.Tensor, serial: torch.Tensor, top_k: int) -> tuple[dict, float]:
    """Route one sequence token by token. -> {(token, expert): weight}, the balance loss times the tokens"""
    name = next(name for name, kind in ROUTERS.items() if type(router) is kind)
    num_experts = router.num_experts
    valid = [t for t in range(len(x)) if serial[t] >= 0]
    logits = x @ router.weight.detach().T
    probs = logits.softmax(-1)
    ranked = {t: sorted(range(num_experts), key=lambda e, t=t: (-float(logits[t, e]), e))[:top_k] for t in valid}
    slots = float("inf")
    if router.capacity.factor is not None and router.training:
        slots = max(1, int(router.capacity.factor * (len(valid) * top_k / num_experts)))
    used = [0] * num_experts
    out: dict[tuple[int, int], float] = {}
    for choice in range(top_k):
        for t in valid:
            expert = ranked[t][choice]
            chosen = [float(logits[t, e]) for e in ranked[t]]
            weight = float(probs[t, expert]) if name == "switch" else float(torch.tensor(chosen).softmax(0)[choice])
            coin = float(uniform(serial[t], router.salt + 1))
            if name == "gshard" and choice == 1 and router.training and not 2 * weight > coin:
                continue
            if used[expert] < slots:
                used[expert] += 1
                out[t, expert] = weight
    counted = 1 if name == "gshard" else top_k
    balance = 0.0
    for e in range(num_experts):
        share = sum(e in ranked[t][:counted] for t in valid) / (counted * max(1, len(valid)))
        balance += num_experts * share * sum(float(probs[t, e]) for t in valid)
    return out, balance


@pytest.mark.parametrize(("name", "top_k", "factor"), CASES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 3), tokens=st.integers(1, 14), train=st.booleans())
def test_router_equals_the_paper(
    name: str, top_k: int, factor: float | None, seed: int, groups: int, tokens: int, train: bool
) -> None:
    torch.manual_seed(seed)
    router = make_router(name, top_k, factor).train(train)
    x = torch.randn(groups, tokens, 8)
    serial = torch.arange(groups * tokens).view(groups, tokens)
    serial = torch.where(torch.rand(groups, tokens) < 0.2, -1, serial)
    expected, balance = {}, 0.0
    for group in range(groups):
        out, loss = loop(router, x[group], serial[group], top_k)
        expected.update({(group * tokens + t, e): w for (t, e), w in out.items()})
        balance += loss
    check(router(x, serial), expected, balance)


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
    router = make_router("sigmoid_bias", top_k, None, 8, num_expert_groups=groups[0], top_k_groups=groups[1],
                         routed_scaling=2.5)
    router.expert_bias.normal_(std=0.3)
    x, serial = torch.randn(1, tokens, 8), torch.arange(tokens).view(1, tokens)
    serial = torch.where(torch.rand(1, tokens) < 0.2, -1, serial)
    expected, probs, chosen = {}, [], [0] * 8
    for t in (t for t in range(tokens) if serial[0, t] >= 0):
        score = (x[0, t] @ router.weight.detach().T).sigmoid().tolist()
        biased = [s + b for s, b in zip(score, router.expert_bias.tolist(), strict=True)]
        size = 8 // groups[0]
        parts = [range(first, first + size) for first in range(0, 8, size)]
        parts.sort(key=lambda part: -sum(sorted((biased[e] for e in part), reverse=True)[:2]))
        best = sorted((e for part in parts[: groups[1]] for e in part), key=lambda e: -biased[e])[:top_k]
        for e in best:
            expected[t, e] = 2.5 * score[e] / sum(score[e] for e in best)
            chosen[e] += 1
        probs.append([s / sum(score) for s in score])
    balance = sum(8 * chosen[e] / (top_k * len(probs)) * sum(p[e] for p in probs) for e in range(8)) if probs else 0.0
    check(router(x, serial), expected, balance)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 3), tokens=st.integers(1, 14), train=st.booleans(),
       factor=st.sampled_from([0.3, 1.0, 1.7, 2.4, 5.0]))
def test_expert_choice_equals_the_paper(seed: int, groups: int, tokens: int, train: bool, factor: float) -> None:
    torch.manual_seed(seed)
    top_k = max(1, round(factor))
    layer = make_layer("expert_choice", top_k, factor).train(train)
    x = torch.randn(groups, tokens, 8)
    x[:, tokens // 2 :] = x[:, : tokens - tokens // 2].clone()  # equal tokens: the earlier one comes first
    serial = torch.arange(groups * tokens).view(groups, tokens)
    serial = torch.where(torch.rand(groups, tokens) < 0.2, -1, serial)
    expected, valid = {}, (serial >= 0).tolist()
    probs = (x @ layer.router.weight.detach().T).softmax(-1)
    for group in range(groups):
        own = [t for t in range(tokens) if valid[group][t]]
        score = {(t, e): math.frexp(float(probs[group, t, e])) for t in own for e in range(5)}
        score = {key: math.floor(m * 2**16) * 2.0**power for key, (m, power) in score.items()}  # 16 bits are compared
        slots = max(1, int(factor * len(own) / 5))
        taken = [(t, e) for e in range(5) for t in sorted(own, key=lambda t, e=e: (-score[t, e], t))[:slots]]
        chosen = [(t, e) for t in own for e in probs[group, t].argsort(descending=True, stable=True)[:top_k].tolist()]
        expected.update({(group * tokens + t, e): float(probs[group, t, e]) for t, e in (taken if train else chosen)})
    check(layer.router(x, serial), expected, 0.0)
    layer(x, serial)
    left = sum(map(sum, valid)) - len({token for token, _ in expected})
    assert int(layer.statistics.dropped) == (left if train else 0)


def test_bias_moves_against_the_load_alone() -> None:
    router = make_router("sigmoid_bias", 2, None, 4)
    assert isinstance(router, SigmoidBiasRouter)
    router.balance(torch.tensor([7, 2, 4, 3]))
    assert router.expert_bias.tolist() == pytest.approx([-0.001, 0.001, 0, 0.001])
    router.balance(torch.tensor([2, 0, 0, 0]))
    assert router.expert_bias.tolist() == pytest.approx([-0.002, 0.002, 0.001, 0.002])
    assert not any("bias" in name for name, _ in router.named_parameters())


def test_equal_logits_take_the_lowest_experts() -> None:
    router = make_router("mixtral", 2, None)
    torch.nn.init.zeros_(router.weight)
    routing, losses = router(torch.randn(1, 10, 8), torch.arange(10).view(1, 10))
    assert routing.tokens_per_expert.tolist() == [10, 10, 0, 0, 0]
    assert float(losses[0]) == pytest.approx(10)  # uniform probabilities: one a token


def test_balance_loss_is_one_when_balanced_and_the_number_of_experts_when_collapsed() -> None:
    router = make_router("switch", 1, None, num_experts=4, d_model=8)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4, 8) * 200)
    serial = torch.arange(12).view(1, 12)
    assert float(router(torch.eye(4, 8).repeat(3, 1).unsqueeze(0), serial)[1][0]) / 12 == pytest.approx(1)
    assert float(router(torch.eye(4, 8)[:1].repeat(12, 1).unsqueeze(0), serial)[1][0]) / 12 == pytest.approx(4)


@pytest.mark.parametrize(("name", "top_k", "factor"), ALL)
def test_padding_changes_nothing(name: str, top_k: int, factor: float | None) -> None:
    torch.manual_seed(1)
    layer = make_layer(name, top_k, factor)
    x, serial = torch.randn(2, 9, 8), torch.arange(18).view(2, 9)
    padded = torch.cat((x, torch.randn(2, 4, 8) * 100), 1)
    padded_serial = torch.cat((serial, torch.full((2, 4), -1)), 1)
    y, losses = layer(x, serial)
    counts = layer.statistics.tokens_per_expert.clone(), layer.statistics.dropped.clone()
    layer.statistics.reset()
    y_padded, losses_padded = layer(padded, padded_serial)
    torch.testing.assert_close(y_padded[:, :9], y)
    assert not y_padded[:, 9:].any()
    torch.testing.assert_close(losses_padded, losses)
    assert torch.equal(layer.statistics.tokens_per_expert, counts[0])
    assert torch.equal(layer.statistics.dropped, counts[1])
    if name != "expert_choice":
        assert int(counts[0].sum() + counts[1]) == 18 * top_k


@pytest.mark.parametrize(("name", "top_k", "factor"), ALL)
def test_causality_is_as_the_table_says(name: str, top_k: int, factor: float | None) -> None:
    torch.manual_seed(2)
    layer = make_layer(name, top_k, factor)
    x, serial = torch.randn(1, 24, 8), torch.arange(24).view(1, 24)
    before = layer(x, serial)[0]
    leaks = False
    for token in range(1, 24):
        changed = x.clone()
        changed[:, token] = torch.randn(8) * 3
        leaks |= not torch.allclose(layer(changed, serial)[0][:, :token], before[:, :token], atol=1e-6)
    assert leaks == ((name == "gshard" and factor == 0.6) or name == "expert_choice")


def test_equal_experts_are_a_dense_layer_forward_and_backward() -> None:
    torch.manual_seed(3)
    layer = make_layer("mixtral", 3, None)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(weight[:1].clone().expand_as(weight))
    x = torch.randn(2, 7, 8, requires_grad=True)
    y, _ = layer(x, torch.arange(14).view(2, 7))
    experts = layer.experts
    assert experts.gate is not None
    dense = (torch.nn.functional.silu(x @ experts.gate[0].T) * (x @ experts.up[0].T)) @ experts.down[0].T
    torch.testing.assert_close(y, dense, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (y, dense))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_shared_experts_answer_every_token_whatever_the_router_drops() -> None:
    torch.manual_seed(4)
    layer = make_layer("switch", 1, 0.1)
    x, serial = torch.randn(2, 9, 8), torch.arange(18).view(2, 9)
    alone, _ = layer(x, serial)
    assert not alone.any(-1).all()
    layer.shared = FeedForward(8, 32, "swiglu", "fan_in")
    for weight in layer.shared.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    gate, up, down = (weight.view(2, 16, 8) if weight.shape[1] == 8 else weight.view(8, 2, 16).permute(1, 0, 2)
                      for weight in layer.shared.parameters())  # as two experts
    both = sum((torch.nn.functional.silu(x @ gate[e].T) * (x @ up[e].T)) @ down[e].T for e in range(2))
    torch.testing.assert_close(layer(x, serial)[0], alone + both, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_give_every_expert_a_gradient(tokens: int) -> None:
    layer = make_layer("switch", 1, 1.0)
    y, losses = layer(torch.randn(1, tokens, 8), torch.arange(tokens).view(1, tokens))
    (y.sum() + losses.sum()).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def make_layer(name: str, top_k: int, factor: float | None) -> MoELayer:
    experts = Experts(5, 8, 16, "swiglu", "fan_in")
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return MoELayer(make_router(name, top_k, factor), experts).train()
