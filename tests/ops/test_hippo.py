"""HiPPO's matrices, discretizations and memories, against scipy and against projections by quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.signal
import scipy.special
import torch

from moescale.ops.discretize import discretize
from moescale.ops.hippo import (
    Measure,
    basis,
    hippo,
    laguerre,
    legendre,
    legs_product,
    legs_solve,
    legs_step,
    reconstruct,
)


def signal(t: np.ndarray) -> np.ndarray:
    """A smooth signal that is zero before t = 0, with its first derivatives."""
    return np.where(t > 0, 1 - np.cos(np.clip(t, 0, None) * 3), 0) * np.cos(t)


def run(a: torch.Tensor, b: torch.Tensor, step: float, method: str | float, end: float) -> torch.Tensor:
    a_bar, b_bar = discretize(a, b, step, method)
    memory = torch.zeros_like(b)
    for k in range(round(end / step)):
        memory = a_bar @ memory + b_bar * float(signal(np.array((k + 0.5) * step)))  # the middle, for a held value
    return memory


def test_polynomials_are_scipys() -> None:
    x = np.linspace(-1, 1, 41)
    for n, column in enumerate(legendre(torch.from_numpy(x), 64).T):
        assert np.allclose(column, scipy.special.eval_legendre(n, x), atol=1e-12)
    age = np.linspace(0, 20, 41)
    for n, column in enumerate(laguerre(torch.from_numpy(age), 12).T):
        assert np.allclose(column, scipy.special.eval_laguerre(n, age), rtol=1e-9, atol=1e-9)
    assert legendre(torch.ones(3), 1).shape == (3, 1)


@pytest.mark.parametrize(("ours", "theirs", "alpha"), [
    ("forward_euler", "gbt", 0), ("backward_euler", "gbt", 1), ("bilinear", "bilinear", None), (0.3, "gbt", 0.3),
    ("zero_order_hold", "zoh", None),
])
def test_discretizations_are_scipys(ours: str | float, theirs: str, alpha: float | None) -> None:
    steps = torch.tensor([0.003, 0.02], dtype=torch.float64)
    for measure in ("legs", "legt", "lagt", "fourier", "lmu"):
        a, b = hippo(measure, 9)
        a_bar, b_bar = discretize(a, b, steps, ours)
        for step, a_one, b_one in zip(steps.tolist(), a_bar, b_bar, strict=True):
            system = (a.numpy(), b.numpy()[:, None], np.ones((1, 9)), np.zeros((1, 1)))
            a_scipy, b_scipy, *_ = scipy.signal.cont2discrete(system, step, theirs, alpha=alpha)
            assert np.allclose(a_one, a_scipy, atol=1e-12)
            assert np.allclose(b_one, b_scipy[:, 0], atol=1e-12)
    inputs = [x.requires_grad_() for x in (*hippo("legt", 3), steps)]
    assert torch.autograd.gradcheck(lambda *x: discretize(*x, ours), inputs)


def test_gate_is_backward_euler() -> None:
    """x' = -x + u over a step of exp(z) is a gated unit of gate sigmoid(z) (LSSL, lemma 3.1; LagT of size 1)."""
    a, b = hippo("lagt", 1)
    z = torch.tensor(0.7, dtype=torch.float64)
    a_bar, b_bar = discretize(a, b, z.exp(), "backward_euler")
    assert torch.allclose(a_bar[0], 1 - z.sigmoid())
    assert torch.allclose(b_bar, z.sigmoid())


@pytest.mark.parametrize(
    ("method", "order"), [("forward_euler", 1), ("backward_euler", 1), ("bilinear", 2), ("zero_order_hold", 2)])
def test_error_orders(method: str, order: int) -> None:
    """Halving the step divides the error by 2 or 4, against scipy's solution of the differential equation."""
    a, b = hippo("legt", 5)
    solution = scipy.integrate.solve_ivp(
        lambda t, x: a.numpy() @ x + b.numpy() * signal(t), (0, 2), np.zeros(5), rtol=1e-11, atol=1e-12).y[:, -1]
    errors = [float((run(a, b, step, method, 2) - torch.from_numpy(solution)).norm()) for step in (1 / 400, 1 / 800)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def project(measure: Measure, size: int, end: float) -> np.ndarray:
    """The coefficients of least squares, by quadrature over the measure."""
    if measure == "lagt":
        age, weight = scipy.special.roots_laguerre(150)
    else:
        age, weight = scipy.special.roots_legendre(300)
        age, weight = (age + 1) / 2, weight / 2
    values = basis(measure, size, torch.from_numpy(age)).numpy()
    gram = (values * weight[:, None]).T @ values
    times = end - age * (end if measure == "legs" else 1)
    return np.linalg.solve(gram, (values * weight[:, None]).T @ signal(times))


@pytest.mark.parametrize(
    ("measure", "size", "tolerance"), [("legt", 16, 1e-4), ("lmu", 16, 1e-4), ("fourier", 129, 0.05)])
def test_windowed_memory_is_the_projection(measure: Measure, size: int, tolerance: float) -> None:
    end, a_and_b = 3.0, hippo(measure, size)
    memory = run(*a_and_b, 1 / 2000, "zero_order_hold", end).numpy()
    exact = project(measure, size, end)
    assert np.linalg.norm(memory - exact) <= tolerance * np.linalg.norm(exact)
    age = torch.linspace(0.1, 0.9, 17, dtype=torch.float64)
    error = reconstruct(measure, torch.from_numpy(memory), age).numpy() - signal(end - age.numpy())
    assert np.abs(error).max() <= 10 * tolerance
    assert np.linalg.eigvals(a_and_b[0].numpy()).real.max() < 0, "it forgets"


def test_fourier_memory_follows_a_wave() -> None:
    """The history of a wave that fits the window is known exactly: cos(4 pi (t - r)) at age r."""
    (a, b), t = hippo("fourier", 9), torch.tensor(0.3, dtype=torch.float64)
    memory, slope = torch.zeros(2, 9, dtype=torch.float64)
    memory[3], memory[4] = (4 * math.pi * t).cos() / math.sqrt(2), (4 * math.pi * t).sin() / math.sqrt(2)
    slope[3], slope[4] = -4 * math.pi * memory[4], 4 * math.pi * memory[3]
    assert torch.allclose(a @ memory + b * (4 * math.pi * t).cos(), slope)


def test_laguerre_memory_is_the_projection() -> None:
    memory = run(*hippo("lagt", 12), 1 / 2000, "zero_order_hold", 3.0)
    # The integral over the past by the trapezoidal rule: the signal has a corner, at which quadrature stumbles.
    age = torch.linspace(0, 3, 60001, dtype=torch.float64)
    weighed = basis("lagt", 12, age).numpy() * (np.exp(-age.numpy()) * signal(3 - age.numpy()))[:, None]
    assert np.allclose(memory, scipy.integrate.trapezoid(weighed, age.numpy(), axis=0), atol=1e-6)


def test_lmu_is_legt_in_another_scale() -> None:
    """The diagonal is sqrt(2n+1) (-1)^n: LMU's polynomials are not normalised, and run the other way."""
    n = torch.arange(10, dtype=torch.float64)
    scale = (2 * n + 1).sqrt() * (-1) ** n
    (a, b), (a_lmu, b_lmu) = hippo("legt", 10), hippo("lmu", 10)
    assert torch.allclose(scale[:, None] * a / scale[None, :], a_lmu)
    assert torch.allclose(scale * b, b_lmu)


def legs(u: torch.Tensor, size: int, alpha: float = 0.5) -> torch.Tensor:
    memory = torch.zeros(size, dtype=u.dtype)
    for k, value in enumerate(u, 1):
        memory = legs_step(memory, value, 1 / k, alpha)
    return memory


def test_legs_step_is_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = hippo("legs", 100)
    memory, u = torch.randn(3, 2, 100, dtype=torch.float64, generator=generator), torch.randn(3, 2, dtype=torch.float64)
    assert torch.allclose(legs_product(memory), memory @ a.T, rtol=1e-12)
    rows = memory.flatten(0, 1)
    dense = scipy.linalg.solve_triangular((torch.eye(100) - 0.3 * a).numpy(), rows.numpy().T, lower=True)
    assert np.allclose(legs_solve(rows, 0.3).T, dense, atol=1e-12)
    for k in (1, 7, 1000):
        for alpha in (0.0, 0.5, 1.0):
            a_bar, b_bar = discretize(a, b, 1 / k, alpha)
            expected = memory @ a_bar.T + u.unsqueeze(-1) * b_bar
            assert (legs_step(memory, u, 1 / k, alpha) - expected).norm() <= 1e-12 * expected.norm()


def test_legs_memory_is_the_projection_and_knows_no_time_scale() -> None:
    times = np.linspace(0, 3, 1001)[1:]
    u = torch.from_numpy(signal(times))
    memory, exact = legs(u, 24), project("legs", 24, 3.0)
    assert np.linalg.norm(memory.numpy() - exact) <= 6e-3 * np.linalg.norm(exact)
    age = torch.linspace(0.05, 0.95, 17, dtype=torch.float64)
    assert np.abs(reconstruct("legs", memory, age).numpy() - signal(3 - 3 * age.numpy())).max() < 0.02
    slower = legs(u.repeat_interleave(2), 24)
    assert (slower - memory).norm() <= 6e-3 * memory.norm()
    # Of values that lie unevenly, (t_k - t_(k-1)) / t_k stands for 1/k.
    times = np.cumsum(np.random.default_rng(0).uniform(1.5e-3, 4.5e-3, 1000))
    uneven = torch.zeros(24, dtype=torch.float64)
    for before, now in zip(np.append(0, times), times, strict=False):
        uneven = legs_step(uneven, torch.tensor(signal(np.array(now))), (now - before) / now)
    exact = project("legs", 24, times[-1])
    assert np.linalg.norm(uneven.numpy() - exact) <= 1e-2 * np.linalg.norm(exact)


def test_gradient_of_legs_falls_as_one_over_time() -> None:
    """The gradient of the memory at t with respect to an early value is Theta(1/t) (HiPPO, proposition 5)."""
    norms = []
    for length in (300, 600, 1200):
        memory = torch.zeros(8, dtype=torch.float64)
        for k in range(1, length + 1):  # the memory is linear in the values: its answer to one of them is the gradient
            memory = legs_step(memory, torch.tensor(float(k == 100), dtype=torch.float64), 1 / k)
        norms.append(float(memory.norm()) * length)
    assert max(norms) <= 2 * min(norms)


def test_unknown_names_are_refused() -> None:
    a, b = hippo("legt", 4)
    with pytest.raises(ValueError, match="use forward_euler"):
        discretize(a, b, 0.1, "euler")
    with pytest.raises(ValueError, match="use one of legs"):
        hippo("legd", 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use 5"):
        hippo("fourier", 4)
