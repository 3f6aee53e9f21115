"""The schedule, which weights decay, and the norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moescale.config import OptimConfig, parse_config
from moescale.model.build import build_model
from moescale.optim.gradient_norm import clip_gradients
from moescale.optim.optimizer import build_optimizer
from moescale.optim.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_rises_then_falls(schedule: str) -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4, schedule=schedule, final_lr_share=0.25)
    rates = [learning_rate(step, 21, config) for step in range(21)]
    assert rates[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert rates[4] == 2.0
    assert rates[20] == pytest.approx(2.0 if schedule == "constant" else 0.5)
    assert rates[12] == pytest.approx(2.0 if schedule == "constant" else 1.25)


def test_norms_and_embeddings_do_not_decay() -> None:
    config = parse_config({"optim": {"weight_decay": 0.3}}, "test")
    model = build_model(config, "cpu")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in build_optimizer(model, config.optim).param_groups
              for p in group["params"]}
    assert decays.keys() == dict(model.named_parameters()).keys()
    for name, decay in decays.items():
        assert decay == (0.0 if "norm" in name or "embedding" in name else 0.3), name


def test_clipping_equals_torch() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2, 2))]
    for parameter in ours:
        parameter.grad = torch.randn_like(parameter)
    theirs = [nn.Parameter(torch.zeros_like(parameter)) for parameter in ours]
    for a, b in zip(ours, theirs, strict=True):
        b.grad = a.grad.clone()
    norm = clip_gradients(ours, 0.7)
    torch.testing.assert_close(norm.float(), nn.utils.clip_grad_norm_(theirs, 0.7))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
