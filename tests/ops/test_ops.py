"""Every op against its plain form: outputs and every gradient."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.layers.positions import alibi_slopes
from moescale.moe.routing import Routing
from moescale.ops import expert_feed_forward_blocks, native, product, shares
from moescale.ops.attention import attention
from moescale.ops.expert_feed_forward import expert_feed_forward, expert_feed_forward_reference
from moescale.ops.grouped_gemm import grouped_gemm, grouped_gemm_reference
from moescale.ops.permute import permute, unpermute
from moescale.ops.product import linear
from moescale.ops.rms_norm import rms_norm, rms_norm_reference
from moescale.ops.rotary import rotate, rotate_reference
from moescale.ops.router import rows_by_expert, rows_by_expert_reference, top_k
from moescale.ops.token_random import uniform, uniform_features
from tests.support.threads import torch_threads


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    b = b.double()
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-30))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 130), st.integers(500, 530)), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(["silu", "gelu", "relu"]), st.booleans(),
    st.sampled_from([0, 1 << 20]), st.booleans(), st.integers(1, 5), st.booleans(), st.booleans(),
    st.sampled_from([0, 256]),
)
def test_experts_equal_a_loop(
    sizes: list[int], dtype: torch.dtype, activation: str, gated: bool, block_numbers: int, dropout: bool, threads: int,
    has_bfloat16: bool, compiled: bool, narrow: int,
) -> None:
    """Over 540 tokens, some without experts; in blocks of at most 256 rows, or one an expert and thread."""
    torch.manual_seed(sum(sizes))
    num_experts, tokens = len(sizes), 540
    token = torch.cat([torch.randperm(tokens)[:size].sort().values for size in sizes])
    row = torch.full((tokens, num_experts), -1)
    row[token, torch.arange(num_experts).repeat_interleave(torch.tensor(sizes))] = torch.arange(len(token))
    shapes = [(tokens, 16), (num_experts, 24, 16), (num_experts, 24, 16), (num_experts, 16, 24)]
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    grad, weight = torch.randn(tokens, 16, dtype=dtype), torch.rand(len(token))
    keep = torch.ones(len(token), 24, dtype=dtype) if dropout else None
    results = []
    for function, to in ((expert_feed_forward, dtype), (expert_feed_forward_reference, torch.float64)):
        x, gate, up, down = (tensor.to(to, copy=True).requires_grad_() for tensor in inputs)
        w = weight.to(torch.promote_types(to, torch.float32), copy=True).requires_grad_()
        routing = Routing(token, w, torch.tensor(sizes), row)
        arguments = (x, gate if gated else None, up, down, routing, activation)
        with (
            mock.patch.multiple(shares, BLOCK_NUMBERS=block_numbers, FEWEST_ROWS=1, FEWEST_ROWS_IN_STEPS=1),
            mock.patch.object(native, "PART_NUMBERS", 100),
            torch_threads(threads), mock.patch.object(product, "HAS_BFLOAT16", has_bfloat16),
            mock.patch.object(expert_feed_forward_blocks, "NARROW", narrow),
            nullcontext() if compiled else mock.patch.object(native, "_library", return_value=None),
        ):
            out = function(*arguments, keep) if keep is not None and to == dtype else function(*arguments)
            out.backward(grad.to(to))
            assert torch.get_num_threads() == threads
        results.append((out, x.grad, up.grad, down.grad, *([gate.grad] if gated else []), w.grad))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, exact in zip(*(each[:-1] for each in results), strict=True):
        assert ours.shape == exact.shape
        assert relative(ours.detach(), exact.detach()) < bound
    # A weight's gradient is a product of two vectors, whose terms may cancel: held to the lengths of these.
    alone = Routing(torch.arange(len(token)), torch.ones(len(token)), torch.tensor(sizes), row)
    answers = expert_feed_forward_reference(x.detach()[token], *arguments[1:4], alone, activation)
    lengths = grad.double()[token].norm(dim=1) * answers.detach().norm(dim=1)
    assert float((results[0][-1] - results[1][-1]).norm()) <= bound / 4 * float(lengths.norm())
    for index, size in enumerate(sizes):
        if size == 0:
            assert not results[0][2][index].any(), "an expert without rows has a gradient of zeros"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("sizes", [[0, 1, 0, 3], [0, 0, 0, 0]], ids=["few", "none"])
def test_few_rows_without_gradients_equal_a_loop(sizes: list[int], gated: bool, dtype: torch.dtype) -> None:
    """Of 5 tokens, as in generation: one has two experts, and some have none."""
    torch.manual_seed(0)
    token = torch.tensor([2, 0, 2, 4][: sum(sizes)], dtype=torch.int64)
    x, gate, up, down = (torch.randn(shape, dtype=dtype) for shape in ((5, 16), (4, 24, 16), (4, 24, 16), (4, 16, 24)))
    routing = Routing(token, torch.rand(len(token)), torch.tensor(sizes), torch.full((5, 2), -1))
    with torch.no_grad():
        found = expert_feed_forward(x, gate if gated else None, up, down, routing, "silu")
    wide = [None if each is None else each.double() for each in (x, gate if gated else None, up, down)]
    exact = expert_feed_forward_reference(*wide, routing, "silu")
    assert found.dtype == dtype
    bound = (1e-5 if dtype == torch.float32 else 2e-2) * max(1.0, float(exact.abs().max()))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=bound)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.bfloat16]),
       st.sampled_from([(16, 24), (6, 24), (16, 3)]), st.booleans())
def test_grouped_gemm_equals_a_loop(
    sizes: list[int], dtype: torch.dtype, widths: tuple[int, int], has_bfloat16: bool
) -> None:
    torch.manual_seed(sum(sizes))
    counts = torch.tensor(sizes)
    d_in, d_out = widths
    rows = torch.randn(sum(sizes), d_in, dtype=dtype)
    weight = torch.randn(len(sizes), d_out, d_in, dtype=dtype)
    grad = torch.randn(sum(sizes), d_out, dtype=dtype)
    results = []
    for function, to in ((grouped_gemm, dtype), (grouped_gemm_reference, torch.float64)):
        r, w = rows.to(to, copy=True).requires_grad_(), weight.to(to, copy=True).requires_grad_()
        with mock.patch.object(product, "HAS_BFLOAT16", has_bfloat16):
            out = function(r, w, counts)
            out.backward(grad.to(to))
        results.append((out, r.grad, w.grad))
    for ours, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape
        assert relative(ours.detach(), exact.detach()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_linear_rounds_once_and_keeps_nothing_wide(monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool) -> None:
    monkeypatch.setattr(product, "HAS_BFLOAT16", has_bfloat16)
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(shape).bfloat16() for shape in ((2, 7, 300), (40, 300), (2, 7, 40)))
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.dtype) or x, lambda x: x):
        out = linear(x.requires_grad_(), weight.requires_grad_())
    out.backward(grad)
    wide, matrix = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = wide @ matrix.T
    exact.backward(grad.double())
    assert set(kept) == {torch.bfloat16}
    for ours, reference in ((out.detach(), exact.detach()), (x.grad, wide.grad), (weight.grad, matrix.grad)):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), reference, rtol=2**-8, atol=1e-4)


@pytest.fixture(params=["compiled", "by torch"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With functions compiled on this machine, each part of which takes few numbers, and without."""
    monkeypatch.setattr(native, "PART_NUMBERS", 100)
    if request.param == "by torch":
        monkeypatch.setattr(native, "_library", lambda: None)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rms_norm_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 7, 3, 24).to(dtype).transpose(1, 2)  # as a mixer may leave them, positions first
    weight = torch.rand(24).to(dtype)
    results = []
    for function, to in ((rms_norm, dtype), (rms_norm_reference, torch.float64)):
        a, w = x.to(to, copy=True).requires_grad_(), weight.to(to, copy=True).requires_grad_()
        with torch_threads(2):
            out = function(a, w, 1e-2)
            out.backward(grad.to(to))
        results.append((out.detach(), a.grad, w.grad))
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert relative(ours, exact) < tolerance


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("batches", [1, 2])
def test_rotation_equals_plain_steps(dtype: torch.dtype, tolerance: float, batches: int) -> None:
    """Of a batch with angles of its own or with those of all, its heads a part of something wider."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, 2, 5, 3, 12, dtype=torch.float64).to(dtype)[..., :8]
    angle = torch.randn(batches, 5, 1, 4, dtype=torch.float64)
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    results = []
    for function, to in ((rotate, dtype), (rotate_reference, torch.float64)):
        a = x.to(to, copy=True).requires_grad_()
        with torch_threads(2):
            out = function(a, cosine.to(to), sine.to(to))
            out.backward(grad.to(to))
        results.append((out.detach(), a.grad))
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert relative(ours, exact) < tolerance


@pytest.mark.parametrize("partial", [False, True])
def test_permute_and_unpermute_equal_indexing(partial: bool) -> None:
    torch.manual_seed(0)
    tokens, choices, d_model = 37, 3, 8
    order = torch.randperm(tokens * choices)
    order = order[: tokens * 2] if partial else order
    token = order // choices
    row = torch.full((tokens * choices,), -1)
    row[order] = torch.arange(len(order))
    row = row.view(tokens, choices)
    x = torch.randn(tokens, d_model, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(len(order), dtype=torch.float64, requires_grad=True)
    rows = permute(x, token, row)
    torch.testing.assert_close(rows, x[token])
    expected = torch.zeros_like(x).index_add(0, token, rows * weight.unsqueeze(1))
    torch.testing.assert_close(unpermute(rows, weight, token, row), expected)
    assert torch.autograd.gradcheck(lambda x: permute(x, token, row), (x,))
    assert torch.autograd.gradcheck(lambda r, w: unpermute(r, w, token, row), (rows.detach().requires_grad_(), weight))


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_rows_in_float64(dtype: torch.dtype, compiled: bool, weighed: bool,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once, on two threads, of more features than are added at a time; some choices have no row."""
    if not compiled:
        monkeypatch.setattr(native, "_library", lambda: None)
    row = torch.randperm(900).view(300, 3)
    row[row >= 700] = -1
    row[5] = -1
    rows, weight = torch.randn(700, 500).to(dtype), torch.rand(700) if weighed else None
    expected = torch.zeros(300, 500, dtype=torch.float64)
    for token, choice in (row >= 0).nonzero().tolist():
        index = row[token, choice]
        expected[token] += rows[index].double() * (1 if weight is None else weight[index])
    with torch_threads(2):
        found = unpermute(rows, weight, torch.zeros(700, dtype=torch.int64), row)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=1e-6)


def test_permute_without_a_row() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    none, row = torch.zeros(0, dtype=torch.int64), torch.full((4, 2), -1)
    y = unpermute(permute(x, none, row), torch.zeros(0), none, row)
    y.sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert not x.grad.any()


ATTENTION_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def check_attention(inputs: list[torch.Tensor], grad: torch.Tensor, dtype: torch.dtype, **arguments: object) -> None:
    """q, k, v and the gradient of the output; against the reference in float64 over the same, rounded values."""
    inputs, results = [tensor.to(dtype) for tensor in inputs], []
    for backend, to in (("auto", dtype), ("reference", torch.float64)):
        q, k, v = (tensor.to(to, copy=True).requires_grad_() for tensor in inputs)
        out = attention(q, k, v, backend=backend, **arguments)  # type: ignore[arg-type]
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad.to(dtype).to(to))))
    scale = results[1][0].abs().max()  # a gradient that ought to be nothing, as with one key, is measured by this
    for ours, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape
        assert ours.dtype == dtype
        worst = (ours.double() - exact).abs().max() / torch.maximum(exact.abs().max(), scale)
        assert worst < ATTENTION_TOLERANCE[dtype], f"{worst:.1e}"


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 200), st.one_of(st.none(), st.integers(1, 200)), st.sampled_from([(4, 4), (4, 1), (4, 2)]),
    st.one_of(st.none(), st.sampled_from([1, 2, 64]), st.integers(1, 250)),
    st.lists(st.lists(st.integers(1, 199), max_size=12), min_size=2, max_size=2),
    st.booleans(), st.sampled_from([*ATTENTION_TOLERANCE]),
)
def test_attention_equals_the_reference(
    seq_k: int, seq_q: int | None, heads: tuple[int, int], window: int | None, restarts: list[list[int]],
    alibi: bool, dtype: torch.dtype,
) -> None:
    torch.manual_seed(seq_k)
    seq_q = min(seq_q or seq_k, seq_k)
    positions = torch.arange(seq_k).repeat(2, 1)
    for row, starts in zip(positions, restarts, strict=True):
        for start in sorted(starts):
            row[start:] = torch.arange(max(0, seq_k - start))
    shapes = [(2, seq_q, heads[0], 8), (2, seq_k, heads[1], 8), (2, seq_k, heads[1], 8), (2, seq_q, heads[0], 8)]
    *inputs, grad = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    slopes = alibi_slopes(heads[0]) if alibi else None
    check_attention(inputs, grad, dtype, window=window, positions=positions, alibi_slopes=slopes)


def test_slopes_are_the_papers() -> None:
    """ALiBi, sec. 3: eight heads have 1/2 to 1/256; twelve have those and every second one of sixteen heads."""
    eight = [2.0**-power for power in range(1, 9)]
    assert alibi_slopes(8).tolist() == eight
    assert alibi_slopes(12).tolist() == pytest.approx([*eight, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


def test_attention_over_a_long_sequence_and_other_strides() -> None:
    torch.manual_seed(0)
    for seq, window in ((1050, None), (100, None), (100, 30)):
        inputs = [torch.randn(1, 8, seq, heads, dtype=torch.float64).permute(0, 2, 3, 1) for heads in (2, 1, 1)]
        check_attention(inputs, torch.ones((), dtype=torch.float64).expand(1, seq, 2, 8), torch.float32, window=window)


def test_random_numbers_belong_to_tokens() -> None:
    token_id = torch.arange(200_000)
    draws = uniform(token_id, salt=3)
    assert torch.equal(draws[1000:1100], uniform(token_id[1000:1100], salt=3))
    assert 0 <= draws.min() < 1e-3
    assert 0.999 < draws.max() < 1
    assert abs(float(draws.mean()) - 0.5) < 5e-3
    assert abs(float(draws.var()) - 1 / 12) < 2e-3
    other = torch.stack((draws, uniform(token_id, salt=4), draws.roll(1)))
    assert (torch.corrcoef(other) - torch.eye(3)).abs().max() < 0.01
    assert uniform_features(token_id[:50], 0, 7).flatten().unique().numel() > 345


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("k", [0, 1, 3, 8, 40, 50])
def test_top_k_takes_the_lower_among_equals(k: int) -> None:
    """Of few values, so that many are equal, infinities and what is no number among them."""
    torch.manual_seed(0)
    scores = torch.randint(6, (2, 50, 40)).float()
    scores[0, 0, :9] = torch.tensor([float("nan"), 1, float("inf"), float("nan"), 7, -float("inf"), -0.0, 0.0, 1])
    scores = scores.transpose(0, 1).contiguous().transpose(0, 1)  # rows do not lie in order
    scores.requires_grad_()
    with torch_threads(2):
        values, indices = top_k(scores, k)
    exact = scores.detach().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(indices, exact.indices[..., :k])
    torch.testing.assert_close(values.detach(), exact.values[..., :k], rtol=0, atol=0, equal_nan=True)
    values.sum().backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores).scatter_(-1, indices, 1))


@pytest.mark.parametrize(("experts", "choices"), [(1, 1), (5, 2), (64, 8)])
def test_rows_are_sorted_by_expert_then_token(experts: int, choices: int) -> None:
    """Some choices have no row; of the last expert there is none."""
    torch.manual_seed(0)
    expert = torch.randint(-1, max(1, experts - 1), (31, choices))
    for ours, exact in zip(rows_by_expert(expert, experts), rows_by_expert_reference(expert, experts), strict=True):
        assert torch.equal(ours, exact)
