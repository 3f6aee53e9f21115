"""What training shows only in corners: auxiliary losses without a task, and experts that no token goes to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moescale.engine.native import NativeEngine
from moescale.moe.routers import Router
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from tests.support.layouts import FAMILIES, make_batches, make_config, whole

LAYOUTS = [(2, {"ep": 2}), (4, {"tp": 2, "ep": 4}), (4, {"pp": 2, "cp": 2, "ep": 2})]


def without_a_task(family: str, parallel: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Take one step in which every target is ignored. -> losses and norm; gradients"""
    mesh = start_mesh(config := make_config(family, parallel))
    engine = NativeEngine(config, mesh)
    batches = [replace(batch, targets=torch.full_like(batch.targets, -100))
               for batch in make_batches(0, mesh.batch_rank, mesh.batch_size)]
    losses = engine.forward_backward(batches)
    gradients = {name: whole(p.grad) for name, p in engine.model.named_parameters() if p.grad is not None}
    figures = [float(x) for x in (losses.cross_entropy, losses.load_balance, losses.router_z, engine.step())]
    stop_mesh()
    return figures, gradients


@pytest.mark.parametrize("family", ["mixtral", "gshard", "surest"])
def test_auxiliary_losses_alone_are_the_same_in_every_layout(family: str) -> None:
    (expected, gradients), = run_ranks(1, without_a_task, family, {})
    assert expected[0] == 0 < expected[1]
    assert any(float(gradient.norm()) > 0 for name, gradient in gradients.items() if "router" in name)
    for ranks, parallel in LAYOUTS:
        results = run_ranks(ranks, without_a_task, family, parallel)
        joined = {name: gradient for _, part in results for name, gradient in part.items()}
        assert joined.keys() == gradients.keys()
        for figures, _ in results:
            assert figures == pytest.approx(expected, rel=1e-5)
        for name, gradient in gradients.items():
            error = float((joined[name] - gradient).double().norm() / gradient.double().norm().clamp(min=1e-12))
            assert error < 1e-5, f"{parallel}: {name}"


def all_to_one(family: str, parallel: dict[str, Any]) -> list[tuple[str, float, int]]:
    """Take one step with routers that prefer no expert, so that all take the first ones. -> of experts: norm, steps"""
    mesh = start_mesh(config := make_config(family, parallel))
    engine = NativeEngine(config, mesh)
    for module in engine.model.modules():
        if isinstance(module, Router):
            torch.nn.init.zeros_(module.weight)
    engine.forward_backward(make_batches(0, mesh.batch_rank, mesh.batch_size))
    norms = {name: [float(expert.norm()) for expert in whole(p.grad)]
             for name, p in engine.model.named_parameters() if ".experts." in name}
    engine.step()
    steps = {name: int(engine.optimizer.state[p]["step"]) for name, p in engine.model.named_parameters()}
    stop_mesh()
    return [(name, norm, steps[name]) for name, of_experts in norms.items() for norm in of_experts]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_experts_without_tokens_have_gradients_of_zero_and_step(ranks: int) -> None:
    for result in run_ranks(ranks, all_to_one, "mixtral", {"ep": ranks}):
        of_layer = 3 * FAMILIES["mixtral"]["moe"]["num_experts"]
        assert len(result) == 4 * of_layer
        assert all(step == 1 for _, _, step in result)
        assert sum(norm > 0 for _, norm, _ in result) == 4 * 3 * 2, "two experts of each layer have all tokens"
