"""How weights start and how a step moves them, against the papers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moescale.config import parse_config
from moescale.model.build import build_model
from moescale.model.initialize import initialize
from moescale.model.language_model import LanguageModel
from moescale.optim.optimizer import build_optimizer
from moescale.optim.schedule import learning_rate
from moescale.spec.model import describe
from tests.support.groups import in_groups

CONFIGS = Path(__file__).parents[2] / "configs"
FEATURES, HIDDEN, EXPERT = 96, 160, 128


@pytest.mark.parametrize(("init", "deviation", "embedding"), [
    ("normal", lambda fan_in: 0.02, 0.02),  # GPT-2 and those after it
    ("fan_in", lambda fan_in: fan_in**-0.5, 1.0),  # PaLM, section 2: "fan-in variance scaling"; E ~ N(0, 1)
    ("switch", lambda fan_in: math.sqrt(0.1 / fan_in), 1.0),  # Switch Transformers, section 2.4: s = 0.1
])
def test_weights_start_as_the_papers_say(init: str, deviation: Any, embedding: float) -> None:
    config = parse_config({
        **in_groups({"init": init, "d_model": FEATURES, "num_layers": 2,
                     "num_heads": 4, "num_kv_heads": 4, "head_dim": 16,
                  "d_ff": HIDDEN, "pattern": [{"channel_mixer": "feed_forward"}, {"channel_mixer": "moe"}]}),
        "moe": {"d_ff": EXPERT, "num_experts": 4}}, "test")
    model = build_model(config, "cpu")
    initialize(model, describe(config), seed=1)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert weight.eq(1).all(), name
            continue
        bound = deviation(_fan_in(name))
        if "embedding" in name:
            bound = embedding
        elif init == "switch":  # "we redraw values that are over two standard deviations": those left spread less
            assert float(weight.abs().max()) <= 2 * bound, name
            bound *= 0.8796
        error = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
        assert float(weight.std()) == pytest.approx(bound, rel=error), name
        assert abs(float(weight.mean())) < 5 * bound / math.sqrt(weight.numel()), name


def _fan_in(name: str) -> int:
    """How many features a matrix multiplies."""
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if kind == "down":
        return EXPERT if "experts" in name else HIDDEN
    return 64 if kind == "o" else FEATURES


def test_a_step_is_adamw_with_decay_on_matrices_alone() -> None:
    """Three steps of algorithm 2 of Decoupled Weight Decay Regularization, with its schedule multiplier as lr."""
    model, optimizer = _model_to_step({"lr": 0.01, "betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.5})
    names = [name for name, _ in model.named_parameters()]
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first, second = ({name: torch.zeros_like(weight) for name, weight in expected.items()} for _ in range(2))
    for step in range(1, 4):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            _adamw(expected[name], parameter.grad, first[name], second[name], step, decays=_decays(name))
        optimizer.step()
    for name in names:
        torch.testing.assert_close(model.get_parameter(name).detach(), expected[name], rtol=1e-9, atol=1e-12)
    assert sum(_decays(name) for name in names) == 4 * 2 + 3 + 1 + 3 + 1  # q k v o, a feed-forward, a mixture, the head


def _model_to_step(optim: dict[str, Any]) -> tuple[LanguageModel, torch.optim.Optimizer]:
    config = parse_config({
        **in_groups({"d_model": 16, "num_layers": 2,
                     "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "d_ff": 16,
                  "vocab_size": 264, "pattern": [{"channel_mixer": "feed_forward"}, {"channel_mixer": "moe"}]}),
        "moe": {"num_experts": 3, "d_ff": 8}, "optim": optim}, "test")
    model = build_model(config, "cpu").double()
    initialize(model, describe(config), seed=0)
    torch.manual_seed(0)
    return model, build_optimizer(model, describe(config), config.optim)


def _decays(name: str) -> bool:
    """Matrices decay; the scales of norms and the rows of the embedding do not."""
    return "norm" not in name and "embedding" not in name


def _adamw(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: int, *, decays: bool) -> None:
    lr, beta1, beta2, eps, decay = 0.01, 0.8, 0.9, 1e-3, 0.5 if decays else 0.0
    first.copy_(beta1 * first + (1 - beta1) * grad)
    second.copy_(beta2 * second + (1 - beta2) * grad**2)
    unbiased, spread = first / (1 - beta1**step), second / (1 - beta2**step)
    weight.sub_(lr * unbiased / (spread.sqrt() + eps) + lr * decay * weight)


@pytest.mark.parametrize(("schedule", "share"), [
    ("cosine", lambda done: 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2),  # SGDR, equation 5
    ("linear", lambda done: 1 - 0.9 * done), ("constant", lambda done: 1.0),
    ("wsd", lambda done: min(1.0, 1 - 0.9 * (19 * done - 12) / 7)),  # warm-up, stable, decay over the last 8 steps
])
def test_the_learning_rate_warms_up_and_falls(schedule: str, share: Any) -> None:
    optim = parse_config({"optim": {"schedule": schedule, "lr": 2.0, "warmup_steps": 4, "final_lr_share": 0.1,
                                    "decay_steps": 8 * (schedule == "wsd")}}, "test").optim
    for step in range(24):
        expected = 2.0 * (step + 1) / 5 if step < 4 else 2.0 * share((step - 4) / 19)
        assert learning_rate(step, 24, optim) == pytest.approx(expected, rel=1e-12), step


ADAFACTOR = {"in rows and columns": {"factored": True, "momentum": 0.0, "clip_update": 1.0, "weight_decay": 0.0},
             "as PaLM": {"factored": False, "momentum": 0.9, "clip_update": 1.0, "weight_decay": 1.0},
             "unlimited": {"factored": True, "momentum": 0.5, "clip_update": None, "weight_decay": 3.0}}


@pytest.mark.parametrize("form", ADAFACTOR)
def test_three_steps_are_adafactors(form: str) -> None:
    """Of algorithms 4 and 5 of Adafactor, and of section 5 of PaLM; each expert is a matrix."""
    optim = ADAFACTOR[form]
    model, optimizer = _model_to_step({"lr": 0.3, "name": "adafactor", **optim})
    weights, states = {}, {}  # of matrices and vectors
    for name, parameter in model.named_parameters():
        for number, one in enumerate(parameter.detach() if "experts" in name else parameter.detach()[None]):
            weights[name, number], states[name, number] = one.clone(), {}
    for step in range(1, 4):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter) * step
            for number, grad in enumerate(parameter.grad if "experts" in name else parameter.grad[None]):
                key = name, number
                _adafactor(weights[key], grad.clone(), states[key], step, decays=_decays(name), **optim)
        optimizer.step()
    for (name, number), weight in weights.items():
        ours = model.get_parameter(name).detach()
        torch.testing.assert_close(ours[number] if "experts" in name else ours, weight, rtol=1e-9, atol=1e-12)


def _adafactor(weight: Tensor, grad: Tensor, state: dict[str, Tensor], step: int, *, decays: bool, factored: bool,
               momentum: float, clip_update: float | None, weight_decay: float) -> None:
    def mean(old: str, new: Tensor) -> Tensor:
        keep = 1 - step**-0.8
        state[old] = keep * state.get(old, torch.zeros_like(new)) + (1 - keep) * new
        return state[old]

    squares = grad**2 + 1e-30
    if factored and weight.ndim == 2:
        rows, columns = mean("rows", squares.sum(1)), mean("columns", squares.sum(0))
        spread = torch.outer(rows, columns) / rows.sum()
    else:
        spread = mean("all", squares)
    update = grad / spread.sqrt()
    if clip_update is not None:
        update = update / max(1.0, float(update.pow(2).mean().sqrt()) / clip_update)
    update = 0.3 * max(1e-3, float(weight.pow(2).mean().sqrt())) * update
    state["running"] = momentum * state.get("running", torch.zeros_like(update)) + (1 - momentum) * update
    weight.copy_((1 - 0.3**2 * weight_decay * decays) * weight - state["running"])


def test_adafactor_equals_transformers() -> None:
    """With the weights that are no experts, which transformers' own takes for one tensor each."""
    from transformers.optimization import Adafactor

    model, optimizer = _model_to_step({"lr": 0.02, "name": "adafactor", "momentum": 0.9, "weight_decay": 0.0})
    ours = {name: parameter for name, parameter in model.named_parameters() if "experts" not in name}
    theirs = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
    peer = Adafactor(theirs.values(), lr=0.02, beta1=0.9, scale_parameter=True, relative_step=False)
    torch.manual_seed(0)
    for _ in range(5):
        for name, parameter in ours.items():
            parameter.grad = torch.randn_like(parameter)
            theirs[name].grad = parameter.grad.clone()
        optimizer.step()
        peer.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-9)  # a rate of theirs is a float32


def test_palms_learning_rate_is_full_and_then_one_over_the_root_of_the_step() -> None:
    """Section 5: 10^-2 for the first 10,000 steps, then 1/sqrt(k), k being the step number."""
    optim = parse_config({"optim": {"schedule": "inverse_sqrt", "lr": 1e-2, "stable_steps": 10_000}}, "test").optim
    for k in (1, 9_999, 10_000, 10_001, 40_000, 255_000):
        expected = 1e-2 if k <= 10_000 else k**-0.5
        assert learning_rate(k - 1, 255_000, optim) == pytest.approx(expected, rel=1e-12), k
