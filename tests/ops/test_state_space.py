"""Linear systems by FFT against the recurrence: outputs, last states, every gradient; documents, states, lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.ops.convolution import causal_convolution, causal_convolution_reference
from moescale.ops.discretize import discretize
from moescale.ops.hippo import hippo
from moescale.ops.state_space import krylov_kernel, linear_system, linear_system_reference, stepped_kernel

KINDS = ["dense", "shared", "diagonal", "real", "state"]  # state: dense, and the outputs are the state


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def system(kind: str, channels: int, outputs: int, d_state: int) -> list[torch.Tensor | None]:
    """Draw a stable discrete system and matrices of its input and output."""
    systems = 1 if kind in ("shared", "state") else channels
    dtype = torch.complex128 if kind == "diagonal" else torch.float64
    if kind in ("diagonal", "real"):
        a = 0.5 + 0.5 * torch.rand(systems, d_state, dtype=torch.float64)
        a = torch.polar(a, 6 * torch.rand_like(a)) if dtype.is_complex else a
    else:
        a = 0.99 * torch.linalg.qr(torch.randn(systems, d_state, d_state, dtype=dtype))[0]
    c = None if kind == "state" else torch.randn(systems, outputs, d_state, dtype=dtype)
    return [a, torch.randn(systems, d_state, dtype=dtype), c]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 70), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5),
       st.sampled_from([0.0, 0.05, 0.4, 1.0]), st.booleans())
def test_a_system_equals_its_recurrence(
    kind: str, seq: int, batch: int, channels: int, outputs: int, share: float, restarts_given: bool
) -> None:
    torch.manual_seed(seq * 8 + batch)
    a, b, c = system(kind, channels, outputs, 4)
    assert a is not None
    u = torch.randn(batch, seq, channels, dtype=torch.float64)
    state = torch.randn(batch, channels, 4, dtype=a.dtype)
    restarts = torch.rand(batch, seq) < share if restarts_given else None
    gathered = []
    for function in (linear_system, linear_system_reference):
        inputs = [None if x is None else x.clone().requires_grad_() for x in (u, a, b, c, state)]
        out, last = function(inputs[0], restarts, *inputs[1:])
        torch.manual_seed(0)
        weigh = [torch.randn(x.shape, dtype=x.dtype) for x in (out, last)]
        sum((x * w).sum().real for x, w in zip((out, last), weigh, strict=True)).backward()
        gathered.append([out, last, *(x.grad for x in inputs if x is not None)])
    for ours, theirs in zip(*gathered, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 2, 300])
def test_a_kernel_of_steps_is_one_through_whose_powers_gradients_pass(alpha: float, length: int) -> None:
    torch.manual_seed(0)
    a, b = hippo("legs", 8)
    weigh = torch.randn(3, 2, length, dtype=torch.float64)
    gathered = []
    for fast in (True, False):
        step = torch.tensor([0.001, 0.02, 0.1], dtype=torch.float64, requires_grad=True)
        c = torch.randn(3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        kernel = (stepped_kernel(lambda steps: discretize(a, b, steps, alpha), step, c, length, torch.float64) if fast
                  else krylov_kernel(*discretize(a, b, step, alpha), c, length))
        (kernel * weigh).sum().backward()
        gathered.append([kernel, step.grad, c.grad])
    for ours, theirs in zip(*gathered, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_convolution_equals_the_sum(dtype: torch.dtype, share: float) -> None:
    torch.manual_seed(0)
    u, kernel = torch.randn(3, 100, 4, dtype=dtype), torch.randn(4, 2, 128, dtype=torch.float64)
    restarts = torch.rand(3, 100) < share
    gathered = []
    for function in (causal_convolution, causal_convolution_reference):
        inputs = [u.clone().requires_grad_(), kernel.clone().requires_grad_()]
        out = function(*inputs, restarts)
        out.square().sum().backward()
        gathered.append([out, *(x.grad for x in inputs)])
    for ours, theirs in zip(*gathered, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative(ours.double(), theirs.double()) < {8: 1e-13, 4: 1e-6, 2: 0.02}[dtype.itemsize]


def test_no_document_hears_another() -> None:
    """Not even by rounding: what is not a number stays where it is."""
    u = torch.ones(1, 50, 2)
    u[0, 20:30] = torch.nan
    restarts = torch.arange(50).unsqueeze(0) % 10 == 0
    out = causal_convolution(u, torch.rand(2, 1, 50), restarts)
    assert out[0, 20:30].isnan().any()
    assert not torch.cat((out[0, :20], out[0, 30:])).isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_steps_in_float32(kind: str) -> None:
    """Documents of random lengths; slow states, whose rounding errors live long."""
    torch.manual_seed(0)
    a, b, c = system(kind, 4, 2, 16)
    assert a is not None
    a = a / a.abs().square().sum(-1, keepdim=True).sqrt() * 0.9995 if a.dim() == 3 else a / a.abs() * 0.9995
    a, b, c = (None if x is None else x.to(torch.complex64 if x.is_complex() else torch.float32) for x in (a, b, c))
    u, state = torch.randn(2, 2000, 4), torch.randn(2, 4, 16).to(a.dtype)
    restarts = torch.rand(2, 2000) < 0.002
    out, last = linear_system(u, restarts, a, b, c, state)
    expected, expected_last = linear_system_reference(u, restarts, a, b, c, state)
    assert relative(out, expected) < 1e-5
    assert relative(last, expected_last) < 1e-5
    # Handed on is never cut.
    first, middle = linear_system(u[:, :777], restarts[:, :777], a, b, c, state)
    second, end = linear_system(u[:, 777:], restarts[:, 777:], a, b, c, middle)
    assert relative(torch.cat((first, second), 1), out) < 1e-5
    assert relative(end, last) < 1e-5
