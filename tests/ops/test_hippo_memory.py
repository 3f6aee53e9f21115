"""Memories of documents in sequences against the recurrence, position by position: outputs, every gradient, states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.special
import torch

from moescale.ops.hippo import reconstruct
from moescale.ops.hippo_memory import CHUNK, Memory, after_zeros, hippo_memory, hippo_memory_reference
from moescale.ops.state_space import linear_system

MEMORIES = [Memory("legs", 1), Memory("legs", 16), Memory("legt", 16, 40.0), Memory("lmu", 12, 50.0),
            Memory("lagt", 8, 30.0), Memory("fourier", 9, 32.0)]
every_memory = pytest.mark.parametrize("memory", MEMORIES, ids=lambda each: f"{each.measure} {each.size}")


def documents(rows: Sequence[Sequence[int]], begin: Sequence[int] | None = None) -> torch.Tensor:
    """List positions. rows: the lengths of documents. begin: of the first one of each row, where it goes on."""
    positions = torch.stack([torch.cat([torch.arange(size) for size in sizes]) for sizes in rows])
    for row, (sizes, first) in enumerate(zip(rows, begin or [], strict=False)):
        positions[row, : sizes[0]] += first
    return positions


@every_memory
def test_a_memory_is_the_recurrence(memory: Memory) -> None:
    positions = documents([(70, 20, 30), (3, 1, 116), (120,)], begin=[0, 45, 7])
    torch.manual_seed(0)
    u, weight = torch.randn(3, 120, 2, dtype=torch.float64), torch.randn(3, 120, 2, memory.size, dtype=torch.float64)
    inputs = u.requires_grad_(), torch.randn(3, 2, memory.size, dtype=torch.float64, requires_grad=True)
    found = []
    for function in (hippo_memory, hippo_memory_reference):
        held, last = function(inputs[0], positions, memory, inputs[1])
        loss = (held * weight).sum() + (last * weight[:, 0]).sum()
        found.append((held, last, *torch.autograd.grad(loss, inputs)))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-11)


@every_memory
def test_a_state_handed_on_is_never_cut(memory: Memory) -> None:
    positions = documents([(150,), (CHUNK, 50, 1, 149 - 50 - CHUNK)])
    torch.manual_seed(1)
    u, state, parts = torch.randn(2, 150, 3), None, []
    whole, last = hippo_memory(u, positions, memory)
    for first, end in ((0, 33), (33, 34), (34, 35), (35, 100), (100, 150)):
        held, state = hippo_memory(u[:, first:end], positions[:, first:end], memory, state)
        parts.append(held)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-5)
    zeros, begin = torch.zeros(2, 40, 3), positions[:, -1] + 1
    _, later = hippo_memory(zeros, begin.unsqueeze(1) + torch.arange(40), memory, state)
    torch.testing.assert_close(after_zeros(last, begin, 40, memory), later, rtol=0, atol=1e-5)


@pytest.mark.parametrize("memory", [Memory("legs", 16), Memory("legt", 32, 400.0), Memory("lmu", 32, 400.0)],
                         ids=lambda each: each.measure)
def test_two_thousand_steps_in_single_precision(memory: Memory) -> None:
    """Across documents: chunks, and FFT where there is a convolution, against the recurrence in float64."""
    positions = documents([(700, 1, 150, 1149)])
    torch.manual_seed(2)
    u, state = torch.randn(1, 2000, 1), torch.zeros(1, 1, memory.size)
    expected, _ = hippo_memory_reference(u, positions, memory, state)
    scale = float(expected.abs().max())
    held, _ = hippo_memory(u, positions, memory)
    assert float((held - expected).abs().max()) <= 1e-5 * scale
    if memory.theta is not None:
        a, b = memory.system()
        by_fft, _ = linear_system(u, positions == 0, a[None], b[None], None)
        assert float((by_fft - expected).abs().max()) <= 1e-5 * scale


def test_a_memory_holds_the_delayed_signal() -> None:
    """With values held for a step, what is D positions ago lies (D + 1/2) / theta of the window ago."""
    theta, delays = 200, torch.tensor([0.0, 50.0, 100.0, 150.0])
    spectrum = np.zeros(501, complex)
    generator = np.random.default_rng(0)
    spectrum[1:40] = generator.normal(size=39) + 1j * generator.normal(size=39)  # up to 8 waves a window
    signal = np.fft.irfft(spectrum, 1000)
    u = torch.from_numpy(signal / signal.std()).float()
    positions = torch.arange(1000).unsqueeze(0)
    held, _ = hippo_memory(u[None, :, None], positions, Memory("lmu", 48, theta))
    decoded = reconstruct("lmu", held[0, :, 0], (delays + 0.5) / theta)[400:]
    wrong = reconstruct("lmu", held[0, :, 0], delays / theta)[400:]
    for index, delay in enumerate(delays.long().tolist()):
        true = u[400 - delay : 1000 - delay]
        assert float((decoded[:, index] - true).square().mean().sqrt()) < 0.01, delay
        assert float((wrong[:, index] - true).square().mean().sqrt()) > 0.02, "half a step is seen"
    # The polynomials of the read-out once more, by scipy.
    by_scipy = sum(held[0, 999, 0, n] * scipy.special.eval_legendre(n, 2 * 50.5 / theta - 1) for n in range(48))
    assert float(decoded[-1, 1]) == pytest.approx(float(by_scipy), abs=1e-4)


def test_everything_alike_is_the_exact_fit() -> None:
    """The memory of values held for a step is the projection of a step function, whatever came in which chunk."""
    u = torch.randn(3 * CHUNK + 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    held, _ = hippo_memory(u[None, :, None], torch.arange(len(u)).unsqueeze(0), Memory("legs", 20))
    point, weight = scipy.special.roots_legendre(12)  # exact for a polynomial over each step
    for last in (0, CHUNK, len(u) - 1):
        x = (np.arange(last + 1)[:, None] + (point + 1) / 2) / (last + 1)
        for n in (0, 1, 7, 19):
            polynomial = np.sqrt(2 * n + 1) * scipy.special.eval_legendre(n, 2 * x - 1)
            exact = (u[: last + 1, None].numpy() * polynomial * weight / 2).sum() / (last + 1)
            assert float(held[0, last, 0, n]) == pytest.approx(exact, abs=1e-12)
