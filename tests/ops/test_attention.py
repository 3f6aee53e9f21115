"""What `attention` promises beside its results: which backend runs, what memory it takes, what it refuses."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from moescale.ops import attention as module
from moescale.ops import attention_chunked
from moescale.ops.attention import attention, flex
from moescale.ops.attention_pattern import NOTHING, AttentionPattern, Visibility
from tests.support.memory import Memory
from tests.support.threads import torch_threads


def peak(seq: int, backend: str, device: str = "cpu") -> int:
    """Measure the most bytes that forward and backward hold at a time, inputs included."""
    with Memory() as memory:
        q, k, v = (torch.randn(1, seq, heads, 16, device=device, requires_grad=True) for heads in (4, 2, 2))
        attention(q, k, v, window=700, backend=backend).sum().backward()  # type: ignore[arg-type]
    return memory.peak


def test_chunks_take_memory_for_what_goes_in_and_out_alone() -> None:
    def beside(seq: int) -> int:
        return peak(seq, "chunked") - seq * 4 * 16 * (2 * 8 + 4 + 4 + 1)  # twice q, k, v; out, its gradient, log-sums

    assert beside(8192) < 1.2 * beside(2048)
    assert math.log(peak(4096, "reference") / peak(1024, "reference"), 4) > 1.8


def test_flash_attention_takes_memory_that_grows_with_the_sequence() -> None:
    pytest.importorskip("triton")
    from tools.compile_kernels import recorded

    with recorded() as launches:
        slope = math.log(peak(2**18, "triton", "meta") / peak(2**14, "triton", "meta"), 16)
    assert len(launches) == 6
    assert slope < 1.001


VISIBILITIES = st.builds(
    Visibility, st.one_of(st.none(), st.integers(1, 100)), st.sampled_from([1, 1, 2, 3, 7, 200]),
    st.one_of(st.none(), st.integers(1, 100)), st.sampled_from([0, 0, 1, 3, 9, 100]),
) | st.builds(lambda size, memory: Visibility(block_size=size, memory=memory), st.integers(1, 60), st.integers(1, 60))


@example(40, 0, (2, 2), True, Visibility(dilation=3), [10, 25], False, "auto")
@example(90, 0, (2, 2), True, Visibility(5, global_tokens=9), [50, 57], True, "blocks")
@example(90, 7, (4, 1), True, Visibility(5, global_tokens=9), [50, 57], False, "chunked")
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90), st.integers(0, 40), st.sampled_from([(2, 2), (4, 1)]), st.booleans(),
    VISIBILITIES, st.lists(st.integers(1, 89), max_size=4), st.booleans(),
    st.sampled_from(["auto", "blocks", "chunked", "sdpa"]),
)
def test_backends_equal_the_reference(
    seq_k: int, fewer: int, heads: tuple[int, int], causal: bool, seen: Visibility, restarts: list[int], alibi: bool,
    backend: str,
) -> None:
    torch.manual_seed(seq_k)
    causal = causal or backend == "blocks"
    seq_q, positions = max(1, seq_k - fewer), torch.arange(seq_k).repeat(2, 1)
    for start in sorted(restarts):
        positions[1, start:] = torch.arange(max(0, seq_k - start))
    q, k, v = (torch.randn(2, seq, count, 8, dtype=torch.float64, requires_grad=True)
               for seq, count in ((seq_q, heads[0]), (seq_k, heads[1]), (seq_k, heads[1])))
    slopes, results = torch.rand(heads[0]) if alibi else None, []
    chunk, attention_chunked.CHUNK = attention_chunked.CHUNK, 32
    for name in (backend, "reference"):
        out = attention(q, k, v, causal=causal, positions=positions, scale=0.2, alibi_slopes=slopes,
                        backend=name, **asdict(seen) if causal else {})  # type: ignore[arg-type]
        torch.manual_seed(0)
        results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), torch.randn(out.shape, dtype=out.dtype))))
    attention_chunked.CHUNK = chunk
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-10, rtol=1e-10)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 330), st.integers(0, 330), st.sampled_from([(2, 2), (4, 1), (6, 2)]), st.sampled_from([16, 48, 64]),
    st.one_of(st.none(), st.integers(1, 330)), st.lists(st.integers(1, 329), max_size=4), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 3),
)
def test_compiled_attention_equals_the_reference(
    seq_k: int, fewer: int, heads: tuple[int, int], head_dim: int, window: int | None, restarts: list[int], alibi: bool,
    dtype: torch.dtype, threads: int,
) -> None:
    """In tiles, blocks and segments that are full and not, against float64."""
    torch.manual_seed(seq_k)
    seq_q, positions = max(1, seq_k - fewer), torch.arange(seq_k).repeat(2, 1)
    for start in sorted(restarts):
        positions[1, start:] = torch.arange(max(0, seq_k - start))
    q, k, v = (torch.randn(2, seq, count, head_dim).to(dtype).requires_grad_()
               for seq, count in ((seq_q, heads[0]), (seq_k, heads[1]), (seq_k, heads[1])))
    slopes, grad, results = torch.rand(heads[0]) if alibi else None, torch.randn(q.shape), []
    with torch_threads(threads):
        for name, to in (("compiled", dtype), ("reference", torch.float64)):
            leaves = [leaf.detach().to(to).requires_grad_() for leaf in (q, k, v)]
            out = attention(*leaves, window=window, positions=positions, alibi_slopes=slopes,
                            backend=name)  # type: ignore[arg-type]
            results.append((out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype).to(to))))
    bound = 1e-5 if dtype == torch.float32 else 2**-7
    for ours, exact in zip(*results, strict=True):  # 0.1: of a gradient that is zero
        assert (ours.double() - exact).norm() <= bound * (exact.norm() + 0.1 * exact.numel() ** 0.5)


@settings(max_examples=60, deadline=None)
@given(VISIBILITIES, st.lists(st.integers(0, 40), max_size=3))
def test_what_a_query_sees_is_what_the_survey_says(seen: Visibility, restarts: list[int]) -> None:
    """Query by query and key by key, straight from the definitions (Efficient Transformers, sec. 3)."""
    begins = sorted({0, *restarts})
    number = [index - max(begin for begin in begins if begin <= index) for index in range(41)]  # in its document
    every, window = seen.dilation, seen.window or 1000
    expected = [[
        j <= i and number[i] - number[j] == i - j  # of one document
        and (((i - j) % every == 0 and (i - j) // every < window
              and (seen.block_size is None
                   or number[j] >= number[i] // seen.block_size * seen.block_size - seen.memory))
             or number[j] < seen.global_tokens)
        for j in range(41)] for i in range(41)]
    pattern = AttentionPattern(True, seen, torch.tensor([number]), None, 1.0)
    place = torch.arange(41)
    assert pattern.visible(place, place)[0].tolist() == expected
    far = [[i - j for j in range(41) if expected[i][j] and number[j] >= seen.global_tokens] for i in range(41)]
    assert max(max(each, default=0) for each in far) < (seen.reach or 1000)


@pytest.mark.parametrize("seen", [
    {"window": 300}, {"window": 150, "dilation": 1}, {"block_size": 150}, {"dilation": 1},
    {"window": 4, "global_tokens": 150}, {"block_size": 4, "global_tokens": 200}], ids=str)
def test_what_hides_nothing_is_full_attention(seen: dict[str, int]) -> None:
    q, k, v = (torch.randn(2, 150, heads, 16) for heads in (4, 2, 2))
    positions = torch.arange(150).expand(2, -1)
    exact = attention(q, k, v, positions=positions)
    found = attention(q, k, v, positions=positions, **seen)  # type: ignore[arg-type]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6 if "global_tokens" in seen else 0)


def products(seq: int, seen: dict[str, int]) -> int:
    """Count the FLOPs of forward and backward of attention's scores and sums."""
    aten = torch.ops.aten
    forward, backward = (aten._scaled_dot_product_flash_attention_for_cpu,
                         aten._scaled_dot_product_flash_attention_for_cpu_backward)

    def scores(q: torch.Size, k: torch.Size) -> int:
        return 2 * math.prod(q) * k[2]

    mapping = {forward: lambda q, k, *_, **__: 2 * scores(q, k), backward: lambda _, q, k, *__, **___: 5 * scores(q, k)}
    q, k, v = (torch.randn(1, seq, 2, 16, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        attention(q, k, v, **seen, backend="blocks").sum().backward()  # type: ignore[arg-type]
    return counter.get_total_flops()


def test_what_nobody_sees_is_not_computed() -> None:
    def slope(seen: Callable[[int], dict[str, int]]) -> float:
        """Of log FLOPs over log length, which is 2 for full attention."""
        return math.log(products(4096, seen(4096)) / products(512, seen(512)), 8)

    local: list[dict[str, int]] = [
        {"window": 32}, {"block_size": 32}, {"window": 16, "dilation": 4}, {"window": 16, "global_tokens": 4}]
    for each in local:
        assert slope(lambda _, each=each: each) < 1.1, each  # type: ignore[misc]
    assert slope(lambda _: {"block_size": 32, "memory": 40}) < 1.1
    assert 1.4 < slope(lambda seq: {"dilation": math.isqrt(seq)}) < 1.6
    assert slope(lambda _: {}) > 1.8


@pytest.mark.parametrize("causal", [True, False])
def test_flex_says_the_same_pattern(causal: bool) -> None:
    """Forward alone, and not compiled: on a processor FlexAttention has no backward."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (torch.randn(2, seq, heads, 16) for seq, heads in ((60, 4), (90, 2), (90, 2)))
    positions = torch.stack((torch.arange(90), torch.arange(90) % 31))
    for seen in (Visibility(20, 2, 25, 3), Visibility(block_size=12, memory=20)) if causal else (Visibility(),):
        pattern = AttentionPattern(causal, seen, positions, torch.rand(4), 0.2)
        exact = module._BACKENDS["reference"](q, k, v, pattern, NOTHING)
        torch.testing.assert_close(flex(q, k, v, pattern, flex_attention), exact, atol=1e-5, rtol=1e-5)


def test_the_choice_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    module._say_once.cache_clear()
    q = torch.randn(1, module.SHORT + 1, 2, 16, dtype=torch.float64)
    with caplog.at_level(logging.DEBUG, logger=module.__name__):
        for _ in range(2):
            attention(q, q, q, window=10)
            attention(q, q, q, causal=False)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "attention backend blocks", "attention backend sdpa"
    ]


@pytest.mark.parametrize(("call", "message"), [
    (lambda q: attention(q, q, q, causal=False, window=3), "causal=True"),
    (lambda q: attention(q, q, q, window=2, global_tokens=3, backend="triton"), "knows no global tokens"),
    (lambda q: attention(q[..., :8], q[..., :8], q[..., :8], backend="triton"), "head_dim 16"),
    (lambda q: attention(q, q, q, backend="flex"), "backend=auto"),
    (lambda q: attention(q.double(), q.double(), q.double(), backend="compiled"), "backend=auto"),
    (lambda q: attention(q, q, q, block_size=2, memory=9, remembered=(q, q), backend="flex"), "backend=auto"),
    (lambda q: attention(q, q, q, window=3, memory=2), "block_size alone"),
    (lambda q: attention(q, q, q, alibi_slopes=torch.ones(2, requires_grad=True), backend="blocks"), "no gradient"),
])
def test_what_cannot_be_is_refused(call: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 10, 2, 16))


def test_slopes_that_are_learned_have_a_gradient() -> None:
    torch.manual_seed(0)
    q, grads = torch.randn(1, 20, 2, 16), []
    for backend in ("auto", "reference"):
        slopes = torch.tensor([0.5, 0.1], requires_grad=True)
        attention(q, q, q, alibi_slopes=slopes, backend=backend).square().sum().backward()
        grads.append(slopes.grad)
    torch.testing.assert_close(*grads)
