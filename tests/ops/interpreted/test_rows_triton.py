"""RMSNorm, rotary embedding, and the two steps of the losses straight from the head, against torch."""

from __future__ import annotations

from unittest import mock

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moescale.ops import head_losses as module
from moescale.ops import rotary
from moescale.ops.head_losses import head_losses, head_losses_reference
from moescale.ops.rms_norm import rms_norm_reference
from moescale.ops.rms_norm_triton import rms_norm
from tests.support.exact import TOLERANCE, check

QUICK = settings(deadline=None, phases=(Phase.explicit, Phase.generate))  # shrinking would take minutes
DTYPES = st.sampled_from(list(TOLERANCE))


@settings(QUICK, max_examples=5)
@given(st.integers(0, 20), st.integers(1, 70), DTYPES)
def test_rms_norm(rows: int, d_model: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 1, d_model).double(), torch.rand(d_model).double()
    check(lambda x, w: rms_norm(x, w, 1e-3), lambda x, w: rms_norm_reference(x, w, 1e-3), [x, weight], [dtype] * 2)


@settings(QUICK, max_examples=5)
@given(st.integers(1, 4), st.integers(0, 5), st.integers(1, 9), st.integers(1, 20), DTYPES)
def test_rotary(batch: int, seq: int, heads: int, half: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seq)
    angle = torch.randn(batch, seq, 1, half)
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    with mock.patch.object(rotary, "triton_runs", lambda x: x.dtype != torch.float64):
        check(lambda x: rotary.rotate(x, cosine, sine), lambda x: rotary.rotate_reference(x, cosine, sine),
              [torch.randn(batch, seq, heads, 2 * half)], [dtype])


@settings(QUICK, max_examples=5)
@given(st.integers(1, 12), st.sampled_from([1, 37, 5000]), st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 12))
def test_losses_from_the_head(tokens: int, vocab: int, ignored: float, chunk: int) -> None:
    torch.manual_seed(tokens)
    x, weight = torch.randn(tokens, 16).double() * 5, torch.randn(vocab, 16).double()
    targets = torch.randint(vocab, (tokens,))
    targets[torch.rand(tokens) < ignored] = -100
    with mock.patch.object(module, "triton_runs", lambda x: x.dtype != torch.float64):
        check(lambda x, w: head_losses(x, w, targets, logit_scale=0.7, chunk=chunk),
              lambda x, w: head_losses_reference(x, w, targets, 0.7), [x, weight], [torch.float32] * 2)
