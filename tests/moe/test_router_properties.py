"""What holds for every router: padding, causality, few tokens, one expert, balance, precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moescale.config import parse_config
from moescale.layers.feed_forward import FeedForward
from moescale.model.build import build_model
from moescale.model.initialize import initialize
from moescale.spec.model import describe
from tests.support.groups import in_groups
from tests.support.mixtures import KINDS, Kind, make_layer, make_router

SCOPES = ("sequence", "micro_batch", "global_batch")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_padding_changes_nothing(kind: Kind, train: bool) -> None:
    torch.manual_seed(1)
    layer = make_layer(kind).train(train)
    x, token_id = torch.randn(2, 9, 8), torch.arange(18).view(2, 9)
    padded = torch.cat((x, torch.randn(2, 4, 8) * 100), 1)
    padded_id = torch.cat((token_id, torch.full((2, 4), -1)), 1)
    y, losses = layer(x, token_id)
    counts = layer.statistics.tokens_per_expert.clone(), layer.statistics.dropped.clone()
    layer.statistics.reset()
    y_padded, losses_padded = layer(padded, padded_id)
    torch.testing.assert_close(y_padded[:, :9], y)
    assert not y_padded[:, 9:].any()
    torch.testing.assert_close(losses_padded, losses)
    assert torch.equal(layer.statistics.tokens_per_expert, counts[0])
    assert torch.equal(layer.statistics.dropped, counts[1])
    if not train:
        assert not counts[0].any(), "evaluation is not counted"
    elif kind.name != "expert_choice":
        assert int(counts[0].sum() + counts[1]) == 18 * kind.top_k


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_causality_is_as_the_table_says(kind: Kind) -> None:
    torch.manual_seed(2)
    layer = make_layer(kind)
    assert leaks(layer) == kind.leaks
    layer.router.dropless = True
    assert not leaks(layer.eval()), "decoding"


def leaks(layer: torch.nn.Module) -> bool:
    """Change one token after the other, and see whether an earlier one has another output."""
    x, token_id = torch.randn(1, 24, 8), torch.arange(24).view(1, 24)
    before = layer(x, token_id)[0]
    for token in range(1, 24):
        changed = x.clone()
        changed[:, token] = torch.randn(8) * 3
        if not torch.allclose(layer(changed, token_id)[0][:, :token], before[:, :token], atol=1e-6):
            return True
    return False


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_expert_is_a_dense_layer(kind: Kind) -> None:
    torch.manual_seed(7)
    if kind.name == "gshard":
        pytest.skip("two experts at least")
    own = dict.fromkeys(kind.own, 1)
    layer = make_layer(dataclasses.replace(kind, top_k=1, factor=kind.factor and 1.0, own=own), 1)
    x = torch.randn(2, 7, 8)
    gate, up, down = (weight[0] for weight in (layer.experts.gate, layer.experts.up, layer.experts.down))
    dense = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    y, losses = layer(x, torch.arange(14).view(2, 7))
    torch.testing.assert_close(y, dense, atol=1e-5, rtol=1e-5)
    assert losses[0].item() == pytest.approx(0 if kind.name == "expert_choice" else 14)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_give_every_expert_a_gradient(kind: Kind, tokens: int) -> None:
    """Capacity below one slot and above all tokens, everything to one expert, no token at all."""
    for factor in (0.01, 100.0):
        layer = make_layer(dataclasses.replace(kind, factor=kind.factor and factor))
        x = torch.ones(2, tokens, 8)  # equal tokens want equal experts
        y, losses = layer(x, torch.arange(2 * tokens).view(2, tokens))
        (y.sum() + losses.sum()).backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        assert y.isfinite().all()
        assert losses.isfinite().all()
        if kind.factor and factor == 0.01:
            slots = 2 * kind.capacity.get("least", 1)  # of two sequences
            assert int(layer.statistics.tokens_per_expert.max()) == min(slots, 2 * tokens)
        elif kind.factor and kind.name not in ("gshard", "expert_choice"):  # whose coin drops; whose experts take all
            assert int(layer.statistics.dropped) == 0


def test_equal_experts_are_a_dense_layer_forward_and_backward() -> None:
    torch.manual_seed(3)
    layer = make_layer(Kind("mixtral", 3))
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
    layer = make_layer(Kind("switch", 1, 0.1))
    x, token_id = torch.randn(2, 9, 8), torch.arange(18).view(2, 9)
    alone, _ = layer(x, token_id)
    assert not alone.any(-1).all()
    layer.shared = FeedForward(8, 32, "swiglu")
    for weight in layer.shared.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    gate, up, down = (weight.view(2, 16, 8) if weight.shape[1] == 8 else weight.view(8, 2, 16).permute(1, 0, 2)
                      for weight in layer.shared.parameters())  # as two experts
    both = sum((torch.nn.functional.silu(x @ gate[e].T) * (x @ up[e].T)) @ down[e].T for e in range(2))
    torch.testing.assert_close(layer(x, token_id)[0], alone + both, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("balance_over", SCOPES)
def test_balance_loss_is_one_when_balanced_and_the_number_of_experts_when_collapsed(balance_over: str) -> None:
    for kind in (Kind("switch", 1), Kind("mixtral", 1), Kind("sinkhorn", 1)):
        router = make_router(kind, 4, balance_over=balance_over)
        with torch.no_grad():
            router.weight.copy_(torch.eye(4, 8) * 200)
        token_id = torch.arange(24).view(2, 12)
        balanced, collapsed = torch.eye(4, 8).repeat(6, 1).view(2, 12, 8), torch.eye(4, 8)[:1].repeat(24, 1)
        assert router(balanced, token_id)[1][0].item() / 24 == pytest.approx(1)
        assert router(collapsed.view(2, 12, 8), token_id)[1][0].item() / 24 == pytest.approx(4)
        each = torch.eye(4, 8)[:2].repeat_interleave(12, 0).view(2, 12, 8)  # each sequence collapses onto its own
        assert router(each, token_id)[1][0].item() / 24 == pytest.approx(4 if balance_over == "sequence" else 2)


@pytest.mark.parametrize("balance_over", SCOPES[1:])
def test_balance_loss_multiplies_means_over_all_valid_tokens(balance_over: str) -> None:
    torch.manual_seed(8)
    router = make_router(Kind("gshard", 2, 0.5), balance_over=balance_over)
    x, token_id = torch.randn(3, 9, 8), torch.arange(27).view(3, 9)
    token_id[0, 2:] = token_id[1, 7:] = -1
    logits = torch.nn.functional.linear(x, router.weight)[token_id >= 0]
    share = logits.argmax(-1).bincount(minlength=5) / len(logits)
    expected = 5 * (share * logits.softmax(-1).mean(0)).sum()
    loss = router(x, token_id)[1][0] / len(logits)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(each, router.weight, retain_graph=True)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_router_is_as_exact_under_bfloat16_as_under_float32() -> None:
    """Selective precision (Switch Transformers, sec. 2.4): a bfloat16 router would choose otherwise."""
    torch.manual_seed(9)
    router = make_router(Kind("switch", 1), 512, 64)
    x, token_id = torch.randn(1, 256, 64).bfloat16(), torch.arange(256).view(1, 256)
    (ours, losses), (exact, exact_losses) = router(x, token_id), router(x.float(), token_id)
    assert torch.equal(ours.token, exact.token)
    assert torch.equal(ours.tokens_per_expert, exact.tokens_per_expert)
    assert torch.equal(ours.weight, exact.weight)
    assert torch.equal(losses, exact_losses)
    narrow = torch.nn.functional.linear(x, router.weight.bfloat16()).argmax(-1)
    assert (narrow != torch.nn.functional.linear(x.float(), router.weight).argmax(-1)).any()


def test_evaluation_may_drop_and_decoding_never_does() -> None:
    def build(eval_factor: float | None) -> torch.nn.Module:
        moe = {"router": "switch", "top_k": 1, "num_experts": 4, "d_ff": 16, "capacity_factor": 1.0,
               "eval_capacity_factor": eval_factor}
        config = parse_config({
            **in_groups({"vocab_size": 264, "d_model": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8,
                         "init": "fan_in"}), "moe": moe}, "test")
        model = build_model(config, "cpu")
        initialize(model, describe(config), 3)
        return model.eval()

    tokens = torch.randint(0, 256, (2, 30))
    dropping, dropless = build(0.1), build(None)
    assert torch.equal(dropping.logits(tokens), dropless.logits(tokens))
    inputs = {"targets": tokens, "positions": torch.arange(30).expand(2, 30), "token_id": torch.arange(60).view(2, 30)}
    with torch.no_grad():
        assert dropping(tokens, **inputs)[0] != dropless(tokens, **inputs)[0]
