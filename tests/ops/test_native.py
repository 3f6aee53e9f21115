"""The functions that are compiled on this machine equal torch's, and a machine without a compiler does without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from moescale.ops import expert_feed_forward_blocks as blocks
from moescale.ops import native, shares
from moescale.ops.expert_rows import activate, activate_backward
from tests.support.threads import torch_threads

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_of_every_size_of_number_equal_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of features side by side in one tensor, from 1e-30 to 1e30, zeros, infinities and no numbers among them."""
    size = torch.logspace(-30, 30, 120).repeat(2)
    gate = torch.cat((size * torch.tensor([1.0, -1.0]).repeat_interleave(120), torch.linspace(-100, 100, 200),
                      torch.tensor([0.0, -0.0, float("inf"), float("nan")])))
    rows, width = 3, len(gate)
    both = torch.cat((gate.repeat(rows, 1), torch.randn(rows, width)), 1).to(dtype)
    factor, grad = torch.rand(rows), torch.randn(rows, width).to(dtype)
    found = {}
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(native, "_library", lambda: None)
        assert native.runs(both) == compiled
        hidden, again, grad_both = (both.new_empty(rows, n * width) for n in (1, 1, 2))
        halves, grad_factor = both.chunk(2, 1), torch.empty(rows)
        activate("silu", *halves, factor, hidden)
        activate_backward("silu", *halves, factor, grad.clone(), again, *grad_both.chunk(2, 1), grad_factor)
        torch.testing.assert_close(hidden, again, rtol=1e-2, atol=1e-6, equal_nan=True)
        found[compiled] = hidden, grad_both
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=1e-6, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("narrow", [0, 256], ids=["wide", "narrow"])
def test_a_compiled_share_has_the_bits_of_its_steps(dtype: torch.dtype, narrow: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Of experts in several blocks, across two threads, and without rows: as one call, and step by step.

    Blocks are rounded up in both dtypes, as for oneDNN.
    """
    torch.set_float32_matmul_precision("medium")
    monkeypatch.setattr(blocks, "NARROW", narrow)
    monkeypatch.setattr(shares, "FEWEST_ROWS_IN_STEPS", shares.FEWEST_ROWS)
    monkeypatch.setattr(shares, "BLOCK_NUMBERS", 1)  # of 256 rows
    sizes = [300, 0, 520, 41, 0]
    token = torch.cat([torch.randperm(540)[:size].sort().values for size in sizes])
    weight, grad = torch.rand(len(token)), torch.randn(540, 16).to(dtype)
    shapes = [(540, 16), (5, 24, 16), (5, 24, 16), (5, 16, 24)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    found = []
    with torch_threads(2):
        for compiled in (True, False):
            if not compiled:
                monkeypatch.setattr(blocks, "is_compiled", lambda *_: False)
            leaves = [tensor.clone().requires_grad_() for tensor in (*inputs, weight)]
            out = blocks.feed_forward_in_blocks(*leaves, token, sizes, "silu")
            out.backward(grad)
            found.append([out, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@needs_compiler
def test_what_was_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    native._library.cache_clear()
    try:
        assert native._library() is not None
        [made] = (tmp_path / ".cache/moescale/native").iterdir()
        written = made.stat().st_mtime_ns
        native._library.cache_clear()
        assert native._library() is not None
        assert made.stat().st_mtime_ns == written
    finally:
        native._library.cache_clear()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_does_it(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "COMPILER", compiler)
    monkeypatch.setenv("HOME", str(tmp_path))
    native._library.cache_clear()
    try:
        assert not native.runs(torch.empty(1))
    finally:
        native._library.cache_clear()
