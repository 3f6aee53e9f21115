"""S4's kernels against the naive power series and scipy: taps, every gradient, steps, discretizations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch

from moescale.ops.discretize import discretize
from moescale.ops.hippo import hippo
from moescale.ops.s4 import (
    diagonal_eigenvalues,
    discretize_diagonal,
    discretize_dplr,
    dplr_kernel,
    dplr_kernel_reference,
    dplr_legs,
    dplr_step,
)
from moescale.ops.state_space import krylov_kernel, linear_system

Parameters = list[torch.Tensor]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def dplr(d_state: int, channels: int = 2, outputs: int = 1, step: float = 1e-3) -> Parameters:
    """Make eigenvalues, P, B, C and steps of HiPPO-LegS, disturbed so that P is no longer its own."""
    torch.manual_seed(0)
    eigenvalues, p, b = (x.expand(channels, -1) for x in dplr_legs(d_state))
    p = p * (1 + 0.1 * torch.randn(p.shape, dtype=p.dtype))
    c = torch.randn(channels, outputs, d_state // 2, dtype=p.dtype)
    return [x.clone().requires_grad_() for x in (eigenvalues, p, b, c, step * torch.arange(1, channels + 1).double())]


@pytest.mark.parametrize("d_state", [2, 64])
def test_dplr_is_hippo(d_state: int) -> None:
    """The same transfer function at some complex numbers, with inputs and outputs in HiPPO's own basis."""
    a, b = (x.to(torch.complex128) for x in hippo("legs", d_state))
    eigenvalues, p, b_dplr = (torch.cat((x, x.conj())) for x in dplr_legs(d_state))
    ours = torch.diag(eigenvalues) - torch.outer(p, p.conj())
    for s in (0.3, 2j, 5 - 40j):
        identity = torch.eye(d_state, dtype=a.dtype)
        theirs = b @ torch.linalg.solve(s * identity - a, b)
        got = b_dplr.conj() @ torch.linalg.solve(s * identity - ours, b_dplr)
        assert abs(got - theirs) < 1e-8 * abs(theirs)


@pytest.mark.parametrize(("d_state", "length", "outputs"), [(64, 1024, 1), (8, 333, 3), (4, 3, 2), (2, 1, 1)])
def test_cauchy_kernel_equals_the_power_series(d_state: int, length: int, outputs: int) -> None:
    gathered = []
    weigh = torch.randn(2, outputs, length, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for function in (dplr_kernel, dplr_kernel_reference):
        parameters = dplr(d_state, outputs=outputs)
        more = (discretize_dplr(*parameters)[0],) if function is dplr_kernel else ()
        kernel = function(*parameters, length, *more)
        (kernel * weigh).sum().backward()
        gathered.append([kernel, *(x.grad for x in parameters)])
    assert relative(gathered[0][0], gathered[1][0]) < 1e-12
    for ours, theirs in zip(*gathered, strict=True):
        assert relative(ours, theirs) < 1e-9


def test_cauchy_kernel_in_single_precision() -> None:
    parameters = [x.detach() for x in dplr(64)]
    single = [x.to(torch.complex64 if x.is_complex() else torch.float32) for x in parameters]
    kernel = dplr_kernel(*single, 16384, discretize_dplr(*single)[0])
    parameters[-1] = single[-1].double()
    a_bar, b_bar, c = discretize_dplr(*parameters)
    assert relative(kernel, krylov_kernel(a_bar, b_bar, c, 16384)) < 1e-5
    assert not kernel.isnan().any()


def test_dplr_stays_stable() -> None:
    """Whatever P is, powers of A do not grow."""
    parameters = dplr(16, step=0.3)
    for size in (0.1, 3, 100):
        a_bar = discretize_dplr(parameters[0], size * parameters[1], *parameters[2:])[0]
        assert torch.linalg.eigvals(a_bar).abs().max() < 1


def test_dplr_step_equals_the_dense_system() -> None:
    parameters = [x.detach() for x in dplr(16, channels=3, outputs=2, step=0.01)]
    a_bar, b_bar, c = discretize_dplr(*parameters)
    u, state = torch.randn(4, 50, 3, dtype=torch.float64), torch.randn(4, 3, 16, dtype=torch.float64)
    kernel = dplr_kernel(*parameters, 50, a_bar)
    expected, last = linear_system(u, None, a_bar, b_bar, c, state, kernel)
    for t in range(50):
        out, state = dplr_step(u[:, t], *parameters, state)
        torch.testing.assert_close(out, expected[:, t], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("initialization", ["legs", "lin", "inv", "real"])
@pytest.mark.parametrize(("method", "theirs"), [("zero_order_hold", "zoh"), ("bilinear", "bilinear")])
def test_diagonal_systems_equal_scipy(initialization: str, method: str, theirs: str) -> None:
    """As a dense system of eigenvalues and their conjugates, whose outputs scipy computes step by step."""
    d_state, seq, step = 8, 60, 0.05
    eigenvalues = diagonal_eigenvalues(initialization, d_state)
    b, c = torch.randn(2, d_state // 2, dtype=torch.complex128)
    a_bar, b_bar = discretize_diagonal(eigenvalues[None], b[None], torch.tensor([step]), method)
    u = torch.randn(1, seq, 1, dtype=torch.float64)
    out, _ = linear_system(u, None, a_bar, b_bar, c[None, None])
    full = [torch.cat((x, x.conj())).numpy() for x in (eigenvalues, b, c)]
    dense = (np.diag(full[0]), full[1][:, None], full[2][None], np.zeros((1, 1)))
    matrix, column = scipy.signal.cont2discrete(dense, float(torch.tensor(step)), theirs)[:2]
    state, expected = np.zeros(d_state, complex), []
    # scipy's states lag behind by one step, and its bilinear ones are others: so the recurrence is written out.
    if method == "bilinear":
        column = np.linalg.solve(np.eye(d_state) - float(torch.tensor(step)) / 2 * dense[0],
                                 float(torch.tensor(step)) * full[1])[:, None]
    for value in u.flatten().numpy():
        state = matrix @ state + column[:, 0] * value
        expected.append((full[2] @ state).real)
    torch.testing.assert_close(out.flatten(), torch.tensor(np.array(expected)), rtol=1e-9, atol=1e-9)


def test_dense_systems_equal_scipy() -> None:
    """HiPPO-LegS through `discretize` and the Krylov kernel against scipy's discrete simulation."""
    a, b = hippo("legs", 16)
    c = torch.randn(16, dtype=torch.float64)
    step = torch.tensor([0.003, 0.01], dtype=torch.float64)
    a_bar, b_bar = discretize(a, b, step, "zero_order_hold")
    u = torch.randn(1, 200, 2, dtype=torch.float64)
    out, _ = linear_system(u, None, a_bar, b_bar, c.expand(2, 1, -1))
    for channel in range(2):
        discrete = scipy.signal.cont2discrete((a.numpy(), b[:, None].numpy(), c[None].numpy(), [[0]]),
                                              float(step[channel]), "zoh")
        _, states = scipy.signal.dlsim(discrete, u[0, :, channel].numpy())[1:]
        # dlsim's output sees the state before the input came: ours is the next one.
        following = states @ discrete[0].T + u[0, :, channel, None].numpy() * discrete[1].T
        torch.testing.assert_close(out[0, :, channel, 0], torch.tensor(following) @ c, rtol=1e-8, atol=1e-10)
