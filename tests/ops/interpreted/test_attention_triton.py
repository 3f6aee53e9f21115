"""FlashAttention against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from moescale.ops.attention import attention
from tests.support.exact import TOLERANCE, check

DTYPES = st.sampled_from(list(TOLERANCE))


def run(
    seq_q: int, seq_k: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, *, causal: bool = True,
    window: int | None = None, restarts: list[list[int]] | None = None, alibi: bool = False,
) -> None:
    torch.manual_seed(seq_k)
    batch = 1 if restarts is None else len(restarts)
    positions = torch.arange(seq_k).repeat(batch, 1)
    for row, starts in zip(positions, restarts or [], strict=False):
        for start in sorted(starts):
            row[start:] = torch.arange(max(0, seq_k - start))
    shapes = [(batch, seq_q, heads[0], head_dim), *[(batch, seq_k, heads[1], head_dim)] * 2]
    slopes = torch.rand(heads[0]) if alibi else None

    def call(backend: str):
        return lambda q, k, v: attention(q, k, v, causal=causal, window=window, positions=positions, scale=0.3,
                                         alibi_slopes=slopes, backend=backend)  # type: ignore[arg-type]

    check(call("triton"), call("reference"), [torch.randn(shape, dtype=torch.float64) for shape in shapes], [dtype] * 3)


@settings(max_examples=16, deadline=None, phases=(Phase.explicit, Phase.generate))  # shrinking would take minutes
@given(
    st.integers(1, 100), st.integers(0, 60), st.sampled_from([(2, 2), (4, 1), (4, 2)]), st.sampled_from([16, 24, 64]),
    DTYPES, st.one_of(st.just(False), st.none(), st.sampled_from([1, 32, 200]), st.integers(2, 100)),
    st.lists(st.lists(st.integers(1, 99), max_size=6), min_size=1, max_size=2), st.booleans(),
)
def test_any_shape(
    seq_k: int, fewer: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, window: int | bool | None,
    restarts: list[list[int]], alibi: bool,
) -> None:
    """window: False for attention that is not causal. In bfloat16 of some queries at least: of one, a gradient may be
    what rounding leaves of a sum.
    """
    seq_q = max(1, seq_k - fewer)
    assume(dtype != torch.bfloat16 or seq_q > 3)
    run(seq_q, seq_k, heads, head_dim, dtype, causal=window is not False, window=window or None,
        restarts=restarts, alibi=alibi)


@pytest.mark.parametrize(("seq_q", "seq_k", "window"), [(128, 128, 1), (97, 128, 40), (0, 5, None), (1, 1, 7)])
def test_edges(seq_q: int, seq_k: int, window: int | None) -> None:
    run(seq_q, seq_k, (2, 1), 16, torch.float32, window=window, restarts=[[], [33, 34, 64]])


@pytest.mark.parametrize(("head_dim", "dtype"), [(200, torch.float32), (256, torch.float32), (136, torch.bfloat16)])
def test_large_heads(head_dim: int, dtype: torch.dtype) -> None:
    """In float32 they are multiplied a part at a time."""
    run(35, 50, (2, 1), head_dim, dtype, window=20, restarts=[[11]], alibi=True)


@pytest.mark.parametrize(("size", "memory"), [(16, 40), (40, 7), (1, 33)])
def test_segments_part_the_gradients(size: int, memory: int) -> None:
    """Those of keys that queries of later blocks see go to what is remembered."""
    torch.manual_seed(size)
    positions = torch.stack((torch.arange(90), torch.cat((torch.arange(50), torch.arange(40)))))
    q, k, v = (torch.randn(2, seq, heads, 16) for seq, heads in ((70, 4), (90, 2), (90, 2)))

    def call(backend: str):
        return lambda q, k, v, *remembered: attention(
            q, k, v, block_size=size, memory=memory, remembered=remembered, positions=positions,
            alibi_slopes=torch.rand(4, generator=torch.Generator().manual_seed(0)),
            backend=backend)  # type: ignore[arg-type]

    check(call("triton"), call("reference"), [q, k, v, k, v], [torch.float32] * 5)


def test_other_strides_and_equal_gradients_again() -> None:
    torch.manual_seed(0)
    results = []
    q, k, v = (torch.randn(1, heads, 16, 70).permute(0, 3, 1, 2).requires_grad_() for heads in (4, 2, 2))
    for _ in range(2):
        out = attention(q, k, v, backend="triton")
        results.append(torch.autograd.grad(out.sum(), (q, k, v)))  # its gradient has strides of zero
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    exact = torch.autograd.grad(attention(q, k, v, backend="reference").sum(), (q, k, v))
    for ours, other in zip(results[0], exact, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


def test_only_tiles_that_are_seen_are_read() -> None:
    """What no query sees may hold anything: a mask would turn it into NaN, times zero."""
    q, k, v = (torch.randn(1, 128, 2, 16) for _ in range(3))
    k[:, :64], v[:, :64] = float("nan"), float("nan")
    positions = torch.arange(128).unsqueeze(0) % 64
    for arguments in ({"window": 33}, {"positions": positions}):
        out = attention(q[:, 64:] if "window" not in arguments else q[:, 96:], k, v, backend="triton", **arguments)
        assert out.isfinite().all()


def test_scores_far_apart() -> None:
    q, k, v = (torch.randn(1, 50, 2, 16) for _ in range(3))
    ours, exact = (attention(200 * q, k, v, backend=backend) for backend in ("triton", "reference"))  # type: ignore
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)
