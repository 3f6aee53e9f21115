"""The schedule, which weights decay, and the norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moescale.config import OptimConfig, parse_config
from moescale.model.build import build_model
from moescale.optim.base import OPTIMIZERS
from moescale.optim.gradient_norm import clip_gradients
from moescale.optim.optimizer import build_optimizer, count_from
from moescale.optim.schedule import first_peak, learning_rate, peak_after_change
from moescale.spec.model import describe


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_rises_then_falls(schedule: str) -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4, schedule=schedule, final_lr_share=0.25)
    rates = [learning_rate(step, 21, config) for step in range(21)]
    assert rates[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert rates[4] == 2.0
    assert rates[20] == pytest.approx(2.0 if schedule == "constant" else 0.5)
    assert rates[12] == pytest.approx(2.0 if schedule == "constant" else 1.25)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("lengths", [(20, 30), (20, 12), (20, 40, 60), (20, 20), (8, 20)], ids=str)
def test_a_schedule_that_changes_goes_on_where_it_stands(schedule: str, warmup: int, lengths: tuple[int, ...]) -> None:
    config = OptimConfig(lr=2.0, warmup_steps=warmup, schedule=schedule, final_lr_share=0.25,
                         decay_steps=5 if schedule == "wsd" else 0, stable_steps=7 if schedule == "inverse_sqrt" else 0)
    peak, steps, rates = first_peak(config), lengths[0], []
    for length in lengths[1:]:
        at = len(rates) + 9 if length != 12 else 9
        rates += [learning_rate(step, steps, config, peak) for step in range(len(rates), at)]
        new_peak = peak_after_change(at, steps, config, peak, length, config)
        assert learning_rate(at, length, config, new_peak) == learning_rate(at, steps, config, peak)
        peak, steps = new_peak, length
    rates += [learning_rate(step, steps, config, peak) for step in range(len(rates), steps)]
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True), "never upward"
    root = 2.0 * (7 / steps) ** 0.5  # inverse_sqrt falls as it would have without an end
    assert rates[-1] == pytest.approx({"constant": 2.0, "inverse_sqrt": root}.get(schedule, 0.5))
    unchanged = [learning_rate(step, steps, config) for step in range(steps)]
    stays = schedule in ("constant", "inverse_sqrt") or (schedule == "wsd" and lengths in ((20, 30), (20, 40, 60)))
    assert (rates == unchanged) == (stays or set(lengths) == {20})


def test_a_change_of_the_schedule_itself() -> None:
    old = OptimConfig(lr=2.0, schedule="constant")
    assert peak_after_change(5, 20, old, first_peak(old), 20, OptimConfig(lr=1.0, schedule="constant")) == first_peak(
        old), "another rate alone is no other shape"
    falling = OptimConfig(lr=2.0, schedule="linear", final_lr_share=0.0)
    peak = peak_after_change(10, 20, old, first_peak(old), 20, falling)
    assert [learning_rate(step, 20, falling, peak) for step in (10, 19)] == [2.0, 0.0]
    longer = OptimConfig(lr=2.0, warmup_steps=9)
    early = peak_after_change(4, 20, OptimConfig(lr=2.0, warmup_steps=6), first_peak(longer), 20, longer)
    assert early == first_peak(longer), "within the warm-up it goes on rising to the full rate"


def test_norms_and_embeddings_do_not_decay() -> None:
    config = parse_config({"optim": {"weight_decay": 0.3}}, "test")
    model = build_model(config, "cpu")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, describe(config), config.optim)
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == dict(model.named_parameters()).keys()
    for name, decay in decays.items():
        assert decay == (0.0 if "norm" in name or "embedding" in name else 0.3), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_keeps_what_its_description_says(name: str) -> None:
    config = parse_config({"optim": {"name": name}}, "test")
    model = build_model(config, "cpu")
    optimizer = build_optimizer(model, describe(config), config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    described = {".".join(weight.name): weight for weight in describe(config).weights()}
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for _ in range(2):  # what is there from the start, and after a step
        for key, parameter in model.named_parameters():
            kept = {moment: tuple(tensor.shape) for moment, tensor in optimizer.state[parameter].items()
                    if moment != "step"}
            moments = OPTIMIZERS[name].moments(described[key], config.optim)
            assert kept == {moment.name[0]: moment.shape for moment in moments}, key
            assert all(moment.name[1:] == described[key].name and not moment.learns for moment in moments)
        optimizer.step()
    assert all((parameter != before[key]).any() for key, parameter in model.named_parameters())
    count_from(optimizer, 7)
    assert all(state.get("step", 7) == 7 for state in optimizer.state.values())


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
