"""The balance loss of a step, taken over a sequence, a micro-batch or the global batch, against its definition."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from moescale.config import parse_config
from moescale.data.batches import Batch
from moescale.engine.native import NativeEngine
from moescale.moe.routers import Router
from moescale.parallel.expert import moe_layers
from moescale.parallel.mesh import start_mesh
from tests.support.groups import in_groups


def make_engine(balance_over: str, recompute: str = "none") -> NativeEngine:
    config = parse_config({
        **in_groups({"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
                  "init": "fan_in"}),
        "moe": {"num_experts": 8, "top_k": 2, "router": "gshard", "capacity_factor": 0.8, "d_ff": 16,
                "balance_over": balance_over, "drop_by": "probability", "jitter": 0.01},
        "data": {"seq_len": 24, "global_batch": 6, "micro_batch": 2, "tokenizer": "none.json"},
        "parallel": {"recompute": recompute},
    }, "test").for_world(1)
    return NativeEngine(config, start_mesh(config))


def make_batches(micro_batch: int, seed: int = 3) -> list[Batch]:
    torch.manual_seed(seed)
    tokens = (torch.randn(6, 24).abs() * 20).long().clamp(max=63)
    token_id = torch.arange(144).view(6, 24)
    for row, length in ((0, 5), (3, 20), (4, 1)):
        token_id[row, length:] = -1
    parts = (tokens, torch.where(token_id < 0, -100, tokens.roll(-1, 1)), torch.arange(24).expand(6, 24), token_id)
    return [Batch(*each) for each in zip(*(part.split(micro_batch) for part in parts), strict=True)]


def record(router: Router, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    def choose(whole: Any, logits: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expert, weight = whole(logits, probs)
        if torch.is_grad_enabled():
            seen.append((expert[..., 0].detach(), probs.detach()))
        return expert, weight

    router.choose = partial(choose, router.choose)  # type: ignore[method-assign]


@pytest.mark.parametrize(("balance_over", "sequences"), [("sequence", 1), ("micro_batch", 2), ("global_batch", 6)])
def test_balance_loss_is_its_definition(balance_over: str, sequences: int) -> None:
    engine, batches, expected = make_engine(balance_over), make_batches(2), 0.0
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in moe_layers(engine.model)]
    for layer, passes in zip(moe_layers(engine.model), seen, strict=True):
        record(layer.router, passes)
    losses = engine.forward_backward(batches)
    token_id = torch.cat([batch.token_id for batch in batches])
    for passes in seen:
        expert, probs = (torch.cat(parts) for parts in zip(*passes, strict=True))
        assert len(expert) == 6, "each sequence once"
        for scope in torch.arange(6).split(sequences):
            valid = token_id[scope] >= 0
            share = expert[scope][valid].bincount(minlength=8) / valid.sum()
            expected += float(8 * (share * probs[scope][valid].mean(0)).sum() * valid.sum())
    assert losses.load_balance.item() == pytest.approx(expected / 2 / int((token_id >= 0).sum()), rel=1e-5)


@pytest.mark.parametrize(("recompute", "micro_batch"), [("none", 6), ("full", 6), ("full", 1)])
def test_number_of_passes_and_recompute_change_nothing(recompute: str, micro_batch: int) -> None:
    results = []
    for engine, size in ((make_engine("global_batch"), 2), (make_engine("global_batch", recompute), micro_batch)):
        engine.forward_backward(make_batches(3, seed=4))  # what an earlier step has counted is forgotten
        engine.optimizer.zero_grad()
        losses = engine.forward_backward(make_batches(size))
        counts = [layer.statistics.tokens_per_expert.tolist() for layer in moe_layers(engine.model)]
        results.append((losses, counts, {name: p.grad for name, p in engine.model.named_parameters()}))
    (losses, counts, gradients), (others, other_counts, other_gradients) = results
    assert losses.load_balance.item() == pytest.approx(others.load_balance.item(), rel=1e-6)
    assert counts == other_counts
    torch.testing.assert_close(gradients, other_gradients, rtol=1e-4, atol=1e-6)
