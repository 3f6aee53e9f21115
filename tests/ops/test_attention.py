"""What `attention` promises beside its results: which backend runs, what memory it takes, what it refuses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.ops import attention as module
from moescale.ops import attention_chunked
from moescale.ops.attention import attention, flex
from moescale.ops.attention_pattern import AttentionPattern
from tests.support.memory import Memory


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


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90), st.integers(0, 40), st.sampled_from([(2, 2), (4, 1)]), st.booleans(),
    st.one_of(st.none(), st.integers(1, 100)), st.lists(st.integers(1, 89), max_size=4), st.booleans(),
    st.sampled_from(["auto", "blocks", "chunked", "sdpa"]),
)
def test_backends_equal_the_reference(
    seq_k: int, fewer: int, heads: tuple[int, int], causal: bool, window: int | None, restarts: list[int], alibi: bool,
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
        out = attention(q, k, v, causal=causal, window=window if causal else None, positions=positions, scale=0.2,
                        alibi_slopes=slopes, backend=name)  # type: ignore[arg-type]
        torch.manual_seed(0)
        results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), torch.randn(out.shape, dtype=out.dtype))))
    attention_chunked.CHUNK = chunk
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_flex_says_the_same_pattern(causal: bool) -> None:
    """Forward alone, and not compiled: on a processor FlexAttention has no backward."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (torch.randn(2, seq, heads, 16) for seq, heads in ((60, 4), (90, 2), (90, 2)))
    positions = torch.stack((torch.arange(90), torch.arange(90) % 31))
    pattern = AttentionPattern(causal, 40 if causal else None, positions, torch.rand(4), 0.2)
    exact = module._BACKENDS["reference"](q, k, v, pattern)
    torch.testing.assert_close(flex(q, k, v, pattern, flex_attention), exact, atol=1e-5, rtol=1e-5)


def test_the_choice_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    module._say_once.cache_clear()
    q = torch.randn(1, module.SHORT + 1, 2, 16)
    with caplog.at_level(logging.DEBUG, logger=module.__name__):
        for _ in range(2):
            attention(q, q, q, window=10)
            attention(q, q, q, causal=False)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "attention backend blocks", "attention backend sdpa"
    ]


@pytest.mark.parametrize(("call", "message"), [
    (lambda q: attention(q, q, q, causal=False, window=3), "causal=True"),
    (lambda q: attention(q[..., :8], q[..., :8], q[..., :8], backend="triton"), "head_dim 16"),
    (lambda q: attention(q, q, q, backend="flex"), "backend=auto"),
])
def test_what_cannot_be_is_refused(call: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 10, 2, 16))
