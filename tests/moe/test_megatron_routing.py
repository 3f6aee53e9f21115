"""Megatron-Core's routing functions, written by others, answer as our routers do: choices, weights, losses, drops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moescale.moe.routers import Router, SigmoidBiasRouter
from moescale.moe.routers.sequence_choice import balanced_plan
from tests.support.mixtures import Kind, make_router

pytest.importorskip("megatron.core", reason="needs megatron-core")
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils

GROUPS, TOKENS, EXPERTS = 3, 40, 12
GROUPED = {"num_expert_groups": 4, "top_k_groups": 2, "routed_scaling": 2.5}
SIGMOID: dict[str, Any] = {"score_function": "sigmoid", "scaling_factor": 1.0}
KINDS: list[tuple[Kind, dict[str, Any]]] = [  # ours, and the arguments by which theirs is the same
    (Kind("mixtral", 1, own={"normalize_weights": False}), {"use_pre_softmax": True}),
    (Kind("mixtral", 2), {}),
    (Kind("mixtral", 5), {}),
    (Kind("mixtral", 3, own={"normalize_weights": False}), {"use_pre_softmax": True}),
    (Kind("switch", 1), {"use_pre_softmax": True}),
    (Kind("sigmoid_bias", 2), SIGMOID),
    (Kind("sigmoid_bias", 5, own={"routed_scaling": 2.5}), SIGMOID | {"scaling_factor": 2.5}),
    (Kind("sigmoid_bias", 4, own=GROUPED), SIGMOID | {"scaling_factor": 2.5, "num_groups": 4, "group_topk": 2}),
    (Kind("sigmoid_bias", 2, own=GROUPED), SIGMOID | {"scaling_factor": 2.5, "num_groups": 4, "group_topk": 2}),
]


def settle(router: Router, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Let our router decide about whole sequences.

    logits: [groups, tokens, experts]. Returns the weight of each expert, like logits and zero where it is not used;
    which are used, likewise; [2] losses.
    """
    token_id = torch.arange(logits[..., 0].numel()).view(logits.shape[:2])
    expert, weight, kept, losses = router.settle(logits, token_id, token_id >= 0)
    weights = torch.zeros_like(logits).scatter(-1, expert, weight * kept)
    return weights, torch.zeros_like(logits, dtype=torch.bool).scatter(-1, expert, kept), losses


def draw(kind: Kind, balance_over: str = "sequence") -> tuple[Router, Tensor, Tensor | None]:
    """Make a router with logits that it has not seen, and biases where it has them."""
    torch.manual_seed(len(str(kind)) + kind.top_k)
    router = make_router(kind, EXPERTS, balance_over=balance_over)
    bias = None
    if isinstance(router, SigmoidBiasRouter):
        bias = router.expert_bias.normal_(std=0.2)
    return router, torch.randn(GROUPS, TOKENS, EXPERTS, requires_grad=True), bias


@pytest.mark.parametrize(("kind", "theirs"), KINDS, ids=str)
def test_choices_and_weights(kind: Kind, theirs: dict[str, Any]) -> None:
    router, logits, bias = draw(kind)
    weights, used, _ = settle(router, logits)
    expected, chosen = moe_utils.topk_routing_with_score_function(
        logits.flatten(0, 1), kind.top_k, expert_bias=bias, **theirs)
    assert torch.equal(used.flatten(0, 1), chosen)
    torch.testing.assert_close(weights.flatten(0, 1), expected, rtol=1e-6, atol=1e-7)
    mix = torch.randn_like(weights)
    ours, other = (torch.autograd.grad((result.view_as(mix) * mix).sum(), logits)[0] for result in (weights, expected))
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
@pytest.mark.parametrize(("kind", "theirs"), KINDS, ids=str)
def test_losses(kind: Kind, theirs: dict[str, Any], scope: str) -> None:
    """Ours are sums over tokens, theirs means: of all tokens together, or the mean over sequences of each one's."""
    router, logits, _ = draw(kind, scope)
    losses = settle(router, logits)[2]
    balance = torch.zeros(())
    for tokens in logits if scope == "sequence" else [logits.flatten(0, 1)]:
        chosen, scores = moe_utils.compute_routing_scores_for_aux_loss(
            tokens, kind.top_k, theirs.get("score_function", "softmax"))
        balance = balance + len(tokens) * moe_utils.switch_load_balancing_loss_func(
            scores, chosen.sum(0), len(tokens), kind.top_k, EXPERTS, moe_aux_loss_coeff=1.0)
    z = moe_utils.z_loss_func(logits.flatten(0, 1), z_loss_coeff=1.0) * GROUPS * TOKENS
    for ours, other in zip(losses, (balance, z), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=0)
        gradients = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, other))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [0.3, 0.6, 1.2])
def test_drops_by_probability(factor: float) -> None:
    """Both fill the slots of a sequence with the surest tokens; theirs round their number up, so that it is whole."""
    router, logits, _ = draw(Kind("switch", 1, factor, capacity={"by_probability": True}))
    weights, used, _ = settle(router, logits)
    assert (TOKENS * 10 % EXPERTS) * round(factor * 10) % EXPERTS == 0
    for sequence in range(GROUPS):
        routed = moe_utils.topk_routing_with_score_function(logits[sequence], 1, use_pre_softmax=True)
        expected, kept = moe_utils.apply_router_token_dropping(*routed, 1, factor)
        assert kept.sum() < TOKENS
        assert torch.equal(used[sequence], kept)
        torch.testing.assert_close(weights[sequence], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [0.3, 0.6, 1.2])
def test_drops_by_position(factor: float) -> None:
    """Theirs keep as many, and leave open which: `topk` among ones and zeros. Ours keep the first."""
    router, logits, _ = draw(Kind("switch", 1, factor))
    used = settle(router, logits)[1]
    for sequence in range(GROUPS):
        routed = moe_utils.topk_routing_with_score_function(logits[sequence], 1, use_pre_softmax=True)
        kept = moe_utils.apply_router_token_dropping(*routed, 1, factor, "position")[1]
        assert torch.equal(used[sequence].sum(0), kept.sum(0))
        asked, first = routed[1].cumsum(0), used[sequence].sum(0)
        assert torch.equal(used[sequence], routed[1] & (asked <= first))


@pytest.mark.parametrize("top_k", [1, 3])
def test_sinkhorn(top_k: int) -> None:
    """Ours stop after 20 rounds, theirs when little changes: choices are compared where no two are that near."""
    router, logits, _ = draw(Kind("sinkhorn", top_k))
    weights, used, _ = settle(router, logits)
    plan = balanced_plan(logits, torch.ones(GROUPS, TOKENS, dtype=torch.bool)).exp().float()
    for sequence in range(GROUPS):
        theirs = moe_utils.sinkhorn(logits[sequence].detach(), tol=1e-7) * TOKENS
        torch.testing.assert_close(plan[sequence], theirs, rtol=2e-3, atol=0)
        best = theirs.topk(top_k + 1, -1)
        clear = best.values[:, top_k - 1] > 1.005 * best.values[:, top_k]
        assert clear.float().mean() > 0.9
        chosen = torch.zeros_like(used[sequence]).scatter(-1, best.indices[:, :top_k], True)
        assert torch.equal(used[sequence][clear], chosen[clear])
    probs = logits.softmax(-1)
    torch.testing.assert_close(weights, torch.where(used, probs, 0.0))


def test_biases_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "get_tensor_and_data_parallel_group", lambda **_: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: tensor)
    router, _, bias = draw(Kind("sigmoid_bias", 2))
    assert isinstance(router, SigmoidBiasRouter)
    assert bias is not None
    load = torch.tensor([5, 4, 6, 5, 0, 10, 5, 5, 7, 3, 5, 5])  # some at the mean
    expected = moe_utils.get_updated_expert_bias(load.float().clone(), bias.clone(), router.bias_update_rate)
    router.balance(load)
    torch.testing.assert_close(router.expert_bias, expected)
