"""AdamW with moments in bfloat16: its update in float64, its rounding, and every layout the same bits."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moescale.config import ConfigError, OptimConfig, parse_config
from moescale.engine.native import NativeEngine
from moescale.ops import native
from moescale.optim import adamw
from moescale.optim.adamw import RoundedAdamW
from moescale.optim.base import bytes_of_moments
from moescale.optim.rounding import Draws, store_rounded
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from tests.support.layouts import make_batches, make_config, whole
from tests.support.threads import torch_threads

CONFIG = OptimConfig(moments="bfloat16", lr=0.01, eps=1e-6, betas=(0.9, 0.999))


def make(*shapes: tuple[int, ...], config: OptimConfig = CONFIG) -> tuple[list[nn.Parameter], RoundedAdamW]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    groups = [{"params": [(f"w{index}", parameter)], "weight_decay": 0.1 * index, "experts": False, "max_rate": 1.0}
              for index, parameter in enumerate(parameters)]
    return parameters, RoundedAdamW(groups, config)


def neighbours(exact: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of bfloat16 around each float64, its own twice where it is one."""
    nearest = exact.to(torch.bfloat16)
    step = torch.where(exact.abs() > nearest.double().abs(), 1, -1).to(torch.int16)
    step = torch.where(nearest.double() == exact, 0, step)
    return nearest, (nearest.view(torch.int16) + step).view(torch.bfloat16)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "by torch"])
def test_the_update_in_float64(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native, "_library", lambda: None)
    monkeypatch.setitem(adamw.CHUNK_NUMBERS, "cpu", 32)  # rows of a matrix come in several chunks
    parameters, optimizer = make((), (7,), (9, 12), (3, 5, 4))
    (low, high), rate = CONFIG.betas, CONFIG.lr
    for step in range(1, 8):
        expected = []
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.randn_like(parameter) * 10.0 ** (step - 4)
            state, grad = optimizer.state[parameter], parameter.grad.double()
            first = low * state["exp_avg"].double() + (1 - low) * grad
            second = high * state["exp_avg_sq"].double() + (1 - high) * grad.square()
            weight = parameter.detach().double() * (1 - rate * 0.1 * index)
            root = (second / (1 - high**step)).sqrt() + CONFIG.eps
            expected.append((weight - rate * first / (1 - low**step) / root, first, second))
        optimizer.step()
        for parameter, (weight, *moments) in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-6, atol=1e-7)
            for name, exact in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                stored = optimizer.state[parameter][name]
                assert stored.dtype == torch.bfloat16
                # float32 errs by little more than its last place, which may cross a number of bfloat16
                around = [side for near in (exact * (1 - 1e-6), exact * (1 + 1e-6)) for side in neighbours(near)]
                assert torch.stack([stored == side for side in around]).any(0).all(), name


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled_or_not_the_draws_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored differs only where a last place of float32 crosses a number of bfloat16."""
    monkeypatch.setattr(native, "PART_NUMBERS", 100)
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(native, "_library", lambda: None)
        parameters, optimizer = make((), (700,), (90, 120))
        with torch_threads(3):
            for _ in range(2):
                for parameter in parameters:
                    parameter.grad = parameter.detach() * 0.1
                optimizer.step()
        found.append([optimizer.state[parameter][name].flatten()
                      for parameter in parameters for name in ("exp_avg", "exp_avg_sq")])
    ours, theirs = map(torch.cat, found)
    assert (ours != theirs).float().mean() < 0.002
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)


def test_rounding_is_right_in_the_mean_and_hides_nothing_that_is_not_finite() -> None:
    values = torch.cat((torch.randn(500), torch.randn(500) * 1e-30, torch.tensor([3e-40, 3.3e38, 1.0, 0.0, -0.0])))
    step, draws, total = torch.zeros(()), Draws("w", values), torch.zeros_like(values, dtype=torch.float64)
    rounded = torch.empty_like(values, dtype=torch.bfloat16)
    low, high = neighbours(values.double())
    for _ in range(2048):
        step += 1
        store_rounded(rounded, values, draws.of(slice(None), step)[0])
        assert ((rounded == low) | (rounded == high)).all()
        total += rounded.double()
    spacing = (low.double() - high.double()).abs()
    # the mean of 2048 draws of zero or one errs by at most 0.011 of the spacing, one standard error
    assert ((total / 2048 - values.double()).abs() <= 0.055 * spacing).all()
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32)  # CUDA's, a processor's
    odd = torch.cat((nan, torch.tensor([float("inf"), float("-inf")])))
    for bits in (0, 1, 0xFFFF):
        store_rounded(kept := torch.zeros(4, dtype=torch.bfloat16), odd, torch.full((4,), bits, dtype=torch.int32))
        assert kept.isnan().all()


def test_a_second_moment_falls_as_slowly_as_beta2_says() -> None:
    (parameter,), optimizer = make((64, 64))
    second = optimizer.state[parameter]["exp_avg_sq"]
    parameter.grad = torch.randn(64, 64)
    second.copy_(parameter.grad.square())
    begin, parameter.grad = second.double().mean(), torch.zeros(64, 64)
    for _ in range(400):
        optimizer.step()
    assert float(second.double().mean() / begin) == pytest.approx(0.999**400, rel=0.01)  # to nearest, 1.0


def test_state_that_torch_has_loaded_keeps_its_meaning() -> None:
    """torch casts what it loads to the dtype of the weights."""
    weights = []
    for loads in (False, True):
        torch.manual_seed(0)
        (parameter,), optimizer = make((4, 8))
        for step in range(20):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            if loads and step == 9:
                optimizer.load_state_dict(optimizer.state_dict())
        weights.append(parameter.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-3)


def moments_after_steps(parallel: dict[str, Any], compute: str = "float64") -> dict[str, Tensor]:
    config = make_config("mixtral", parallel, compute)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"moments": "bfloat16"})})
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    for step in range(2):
        engine.forward_backward(make_batches(step, mesh.batch_rank, mesh.batch_size))
        engine.step()
    tensors = {name: whole(tensor) for name, tensor in engine._tensors().items()}
    stop_mesh()
    return tensors


@pytest.mark.parametrize(("ranks", "parallel"), [
    (4, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}), (4, {"ep": 2, "dp_replicate": 2}), (2, {"pp": 2}),
], ids=str)
def test_every_layout_has_the_same_bits(ranks: int, parallel: dict[str, Any]) -> None:
    """In float64, whose errors hardly ever come between a value and its draw; of a pipeline each rank has some."""
    expected = run_ranks(1, moments_after_steps, {})[0]
    for tensors in run_ranks(ranks, moments_after_steps, parallel):
        assert "pp" in parallel or tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            if name.startswith("optim."):
                assert tensor.dtype == torch.bfloat16
                assert torch.equal(tensor, expected[name]), name


def test_a_rank_keeps_half_the_bytes() -> None:
    halves, wholes = (parse_config({"optim": {"moments": dtype}}, "test") for dtype in ("bfloat16", "float32"))
    assert bytes_of_moments(halves) * 2 == bytes_of_moments(wholes)
    with pytest.raises(ConfigError, match=r"optim\.moments means nothing to optim\.name=adafactor: leave it out"):
        parse_config({"optim": {"name": "adafactor", "moments": "bfloat16"}}, "test")
