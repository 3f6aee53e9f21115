"""Scans and convolutions of recurrent mixers against their plain loops: outputs, states and every gradient."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from moescale.ops import scan_blocks
from moescale.ops.causal_conv import causal_conv, causal_conv_reference
from moescale.ops.scan import selective_scan, selective_scan_reference
from moescale.ops.ssd import ssd, ssd_reference
from tests.support.exact import check
from tests.support.memory import Memory

SHAPES = [(1, 1, 1, 1), (2, 37, 3, 4), (3, 64, 8, 16)]  # batch, seq, channels, d_state


def make(batch: int, seq: int, channels: int, d_state: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seq)
    return (torch.randn(batch, seq, channels), torch.rand(batch, seq, channels), -3 * torch.rand(channels, d_state),
            torch.randn(batch, seq, d_state), torch.randn(batch, seq, d_state), torch.randn(channels),
            torch.randn(batch, channels, d_state))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_scan_equal_the_loop(shape: tuple[int, ...], documents: bool, dtype: torch.dtype) -> None:
    *inputs, first = make(*shape)
    restarts = torch.rand(shape[:2]) < 0.15 if documents else None
    dtypes = [dtype, dtype, torch.float32, dtype, dtype, torch.float32, torch.float32]
    with mock.patch.multiple(scan_blocks, ELEMENTS=0, FEWEST=1, MOST=16):  # blocks of d_state positions
        check(lambda *x: selective_scan(*x[:6], restarts, x[6]),
              lambda *x: selective_scan_reference(*x[:6], restarts, x[6]), [*inputs, first], dtypes)
        check(lambda *x: selective_scan(*x), lambda *x: selective_scan_reference(*x), inputs, dtypes[:6])


def test_a_scan_is_its_steps() -> None:
    """2,000 positions at once, of several documents, and one by one with the state handed on, in float32."""
    u, delta, _, b, c, d, first = make(2, 2000, 6, 16)
    a = -torch.arange(1.0, 17).expand(6, 16)
    delta = torch.exp(torch.empty_like(delta).uniform_(-7, -2))
    restarts = torch.zeros(2, 2000, dtype=torch.bool)
    restarts[0, [300, 301, 1700]] = restarts[1, 0] = True
    whole, last = selective_scan(u, delta, a, b, c, d, restarts, first)
    state, steps = first, []
    for t in range(2000):
        at = slice(t, t + 1)
        step, state = selective_scan(u[:, at], delta[:, at], a, b[:, at], c[:, at], d, restarts[:, at], state)
        steps.append(step)
    assert float((torch.cat(steps, 1) - whole).abs().max()) < 1e-5 * float(whole.abs().max())
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_chunks_of_heads_equal_the_loop(groups: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 150, 4, 3), torch.rand(2, 150, 4), -3 * torch.rand(4), torch.randn(2, 150, groups, 5),
              torch.randn(2, 150, groups, 5), torch.randn(4), torch.randn(2, 4, 3, 5)]
    restarts = torch.rand(2, 150) < 0.03
    check(lambda *x: ssd(*x[:6], restarts, x[6]), lambda *x: ssd_reference(*x[:6], restarts, x[6]), inputs,
          [torch.float32] * 7)


def test_heads_are_their_steps() -> None:
    """2,000 positions at once, of several documents, and one by one with the state handed on, in float32."""
    torch.manual_seed(0)
    x, delta, a, d = torch.randn(2, 2000, 4, 3), torch.rand(2, 2000, 4) / 9, -16 * torch.rand(4), torch.randn(4)
    b, c, first = torch.randn(2, 2000, 1, 8), torch.randn(2, 2000, 1, 8), torch.randn(2, 4, 3, 8)
    restarts = torch.zeros(2, 2000, dtype=torch.bool)
    restarts[0, [300, 301, 1700]] = restarts[1, 0] = True
    whole, last = ssd(x, delta, a, b, c, d, restarts, first)
    state, steps = first, []
    for t in range(2000):
        at = slice(t, t + 1)
        step, state = ssd(x[:, at], delta[:, at], a, b[:, at], c[:, at], d, restarts[:, at], state)
        steps.append(step)
    assert float((torch.cat(steps, 1) - whole).abs().max()) < 1e-5 * float(whole.abs().max())
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_memory_of_a_scan_is_linear_without_its_states() -> None:
    """Forward and backward hold some tensors of seq x channels, of which d_state = 64 times as many would be more."""
    def peak(seq: int) -> int:
        inputs = [x.requires_grad_() for x in make(1, seq, 32, 64)[:6]]
        with Memory() as memory:
            selective_scan(*inputs)[0].sum().backward()
        return memory.peak

    short, long = peak(256), peak(640)
    assert long - short < 384 * 32 * 4 * 16


@pytest.mark.parametrize(("seq", "width"), [(1, 4), (19, 4), (5, 1)])
def test_a_convolution_equals_its_products(seq: int, width: int) -> None:
    torch.manual_seed(seq)
    positions = torch.stack([torch.arange(seq) % 7, torch.arange(seq) + 2])  # the second goes on from before
    inputs = [torch.randn(2, seq, 6), torch.randn(6, width), torch.randn(6), torch.randn(2, width - 1, 6)]
    check(lambda x, w, b, before: causal_conv(x, w, b, positions, before),
          lambda x, w, b, before: causal_conv_reference(x, w, b, positions, before), inputs, [torch.float32] * 4)
