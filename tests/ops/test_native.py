"""The functions that are compiled on this machine equal torch's, and a machine without a compiler does without."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moescale.ops import expert_feed_forward_blocks as blocks
from moescale.ops import native, shares
from moescale.ops.attention import attention
from moescale.ops.expert_rows import activate, activate_backward
from moescale.ops.rms_norm import rms_norm, rms_norm_reference
from moescale.ops.rotary import rotate
from moescale.ops.router import rows_by_expert, top_k
from tests.support.threads import torch_threads

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_of_every_size_of_number_equal_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of features side by side in one tensor, from 1e-30 to 1e30, zeros, both infinities and no numbers among them."""
    size = torch.logspace(-30, 30, 120).repeat(2)
    gate = torch.cat((size * torch.tensor([1.0, -1.0]).repeat_interleave(120), torch.linspace(-100, 100, 200),
                      torch.tensor([0.0, -0.0, float("inf"), float("nan"), -1e38, float("-inf")])))
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("narrow", [0, 256], ids=["wide", "narrow"])
@pytest.mark.parametrize("d_model", [128, 72])
def test_experts_of_whole_panels_equal_float64(
    dtype: torch.dtype, narrow: int, d_model: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of odd and even rows, one, and several blocks of an expert; with 128, on some processors, without torch."""
    monkeypatch.setattr(blocks, "NARROW", narrow)
    monkeypatch.setattr(shares, "BLOCK_NUMBERS", 1)  # of 256 rows
    sizes = [301, 0, 522, 41, 1, 64]
    token = torch.cat([torch.randperm(540)[:size].sort().values for size in sizes])
    shapes = [(540, d_model), (6, 192, d_model), (6, 192, d_model), (6, d_model, 192)]
    x, gate, up, down = (torch.randn(shape).div(shape[-1] ** 0.5).to(dtype) for shape in shapes)
    weight, grad = torch.rand(len(token)), torch.randn(540, d_model).to(dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, gate, up, down, weight)]
    with torch_threads(2), no_products_of_torch() if native.multiplies(dtype, d_model, 192) else nullcontext():
        out = blocks.feed_forward_in_blocks(*leaves, token, sizes, "silu")
        out.backward(grad)
    exact = [tensor.double().requires_grad_() for tensor in (x, gate, up, down, weight)]
    answers = []
    for expert, (rows, factors) in enumerate(zip(exact[0][token].split(sizes), exact[4].split(sizes), strict=True)):
        hidden = F.silu(rows @ exact[1][expert].T) * (rows @ exact[2][expert].T) * factors.unsqueeze(1)
        answers.append(hidden @ exact[3][expert].T)
    wanted = torch.zeros(540, d_model, dtype=torch.float64).index_add(0, token, torch.cat(answers))
    wanted.backward(grad.double())
    bound = 2e-6 if dtype == torch.float32 else 1e-2
    found = [out.detach(), *(leaf.grad for leaf in leaves)]
    for ours, theirs in zip(found, [wanted.detach(), *(leaf.grad for leaf in exact)], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < bound


@contextmanager
def no_products_of_torch() -> Iterator[None]:
    """Let compiled functions find that torch cannot multiply."""
    library, functions = native._library(), native._functions_of_torch()
    assert library is not None
    fail = ctypes.CFUNCTYPE(ctypes.c_int32)(lambda: 1)
    library.use_torch(functions[0], ctypes.cast(fail, ctypes.c_void_p), *functions[2:])
    try:
        yield
    finally:
        library.use_torch(*functions)


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


@needs_compiler
def test_defaults_of_torch_and_integers_change_nothing() -> None:
    """What is compiled has buffers of its own dtype, on the processor, and takes an int for a real number."""
    x, weight = torch.randn(5, 8), torch.randn(8, requires_grad=True)
    expected = torch.autograd.grad(rms_norm_reference(x, weight, 1).square().sum(), weight)
    torch.set_default_dtype(torch.float64)
    try:
        found = torch.autograd.grad(rms_norm(x, weight, 1).square().sum(), weight)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected)
    expert = torch.tensor([[0, 1], [1, 0]])
    with torch.device("meta"):
        order, row, counts = rows_by_expert(expert, 2)
    assert (order.tolist(), row.tolist(), counts.tolist()) == ([0, 3, 1, 2], [[0, 2], [3, 1]], [2, 2])


@needs_compiler
def test_functions_that_torch_wraps_are_left_to_torch() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0])
    assert torch.func.grad(lambda given: top_k(given, 2)[0].sum())(scores).tolist() == [1, 0, 1]


@needs_compiler
def test_experts_take_weights_and_tokens_however_they_lie() -> None:
    """Of any stride and dtype, as one call and step by step."""
    x, (gate, up), down = torch.randn(6, 8), torch.randn(2, 2, 4, 8), torch.randn(2, 8, 4)
    token, sizes = torch.tensor([0, 2, 4, 1, 3, 5]), [3, 3]
    for weight in (torch.rand(6, 2)[:, 0], torch.ones(1).expand(6), torch.rand(6).bfloat16()):
        found = blocks.feed_forward_in_blocks(
            x, gate, up, down, weight, token.repeat_interleave(2)[::2], sizes, "silu")
        expected = blocks.feed_forward_in_blocks(x, gate, up, down, weight.float().clone(), token, sizes, "silu")
        torch.testing.assert_close(found, expected)


@needs_compiler
@pytest.mark.parametrize("compiled", [True, False])
def test_what_does_not_fit_is_refused_as_torch_does(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native, "_library", lambda: None)
    x, gate, down = torch.randn(6, 8), torch.randn(2, 4, 8), torch.randn(2, 8, 4)
    token, weight, sizes = torch.arange(6), torch.rand(6), [3, 3]
    for features, first, last in (
        (x.bfloat16(), gate, down), (x[:, :6], gate, down), (x, gate[:, :, :6], down), (x, gate, down[:, :6])
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"dtype|do not fit"):
            blocks.feed_forward_in_blocks(features, first, first, last, weight, token, sizes, "silu")
    q, k = torch.randn(2, 64, 6, 16), torch.randn(2, 64, 4, 16)
    for keys in (k, k[:, :, :3, :8], k[:1, :, :3]):
        with pytest.raises((RuntimeError, ValueError, AssertionError)):
            attention(q, keys, keys, backend="compiled")


@needs_compiler
@pytest.mark.parametrize("compiled", [True, False])
def test_an_expert_that_is_no_number_spoils_no_other(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of blocks that are rounded up, over what the block before has left in the buffer."""
    if not compiled:
        monkeypatch.setattr(native, "_library", lambda: None)
    torch.set_float32_matmul_precision("medium")
    x = torch.randn(6, 8)
    x[2] = torch.inf  # in the first expert's block, of five rows
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 4, 8), (2, 4, 8), (2, 8, 4))]
    token, sizes = torch.tensor([0, 1, 2, 3, 4, 5]), [5, 1]
    blocks.feed_forward_in_blocks(x, *leaves, torch.rand(6), token, sizes, "silu").sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad[1].isfinite().all()


@needs_compiler
def test_second_derivatives_are_refused() -> None:
    """No formula is there for them, and a gradient without them would be wrong in silence."""
    x = torch.randn(2, 32, 2, 16, requires_grad=True)
    angle = torch.rand(2, 32, 1, 8)
    for call in (lambda: rms_norm(x, torch.ones(16), 1e-5), lambda: rotate(x, angle.cos(), angle.sin()),
                 lambda: attention(x, x, x, backend="compiled")):
        gradient, = torch.autograd.grad(call().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
