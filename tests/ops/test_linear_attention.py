"""Linear attention: chunks equal the loop, which equals a masked matrix of all products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moescale.mixers.linear_attention import LinearAttention
from moescale.ops import linear_attention
from moescale.ops.linear_attention import causal_sums, causal_sums_loop


def inputs(seq: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(seq)
    shapes = [(2, seq, 3, 4), (2, seq, 3, 4), (2, seq, 3, 5), (2, 3, 4, 5)]
    return [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes], torch.rand(2, seq) < 0.05


@pytest.mark.parametrize("seq", [1, 5, 16, 40, 67])
def test_chunks_equal_the_loop(seq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_attention, "CHUNK", 16)
    (q, k, v, first), restarts = inputs(seq)
    results = []
    for function in (causal_sums, causal_sums_loop):
        found = function(q, k, v, restarts, first)
        torch.manual_seed(0)
        weighted = sum((each * torch.randn(each.shape, dtype=each.dtype)).sum() for each in found)
        results.append([*found, *torch.autograd.grad(weighted, (q, k, v, first))])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    half = seq // 2  # a state handed on is as if never cut
    if half:
        _, state = causal_sums(q[:, :half], k[:, :half], v[:, :half], restarts[:, :half], first)
        rest, last = causal_sums(q[:, half:], k[:, half:], v[:, half:], restarts[:, half:], state)
        torch.testing.assert_close((rest, last), (results[0][0][:, half:], results[0][1]), rtol=1e-10, atol=1e-10)


def test_the_mixer_is_the_papers_formula() -> None:
    """Equation 9 of Transformers are RNNs with all products in a matrix, masked by documents; every gradient."""
    torch.manual_seed(0)
    mixer = LinearAttention(12, 3, 4).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 70, 12, dtype=torch.float64, requires_grad=True)
    positions = torch.stack((torch.arange(70), torch.arange(70) % 23))
    q, k, v = (torch.stack((x @ part.weight.T).split(4, -1), 1) for part in (mixer.q, mixer.k, mixer.v))
    q, k = (torch.nn.functional.elu(each) + 1 for each in (q, k))
    document = (positions == 0).cumsum(1)
    sees = (document[:, :, None] == document[:, None]) & torch.ones(70, 70).tril().bool()
    products = torch.einsum("bhid,bhjd->bhij", q, k) * sees[:, None]
    expected = torch.cat((products / products.sum(-1, keepdim=True) @ v).unbind(1), -1) @ mixer.o.weight.T
    found = mixer(x, positions)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(found.shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((each * weights).sum(), [x, *mixer.parameters()]) for each in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_a_query_far_below_zero_divides_by_no_zero() -> None:
    mixer = LinearAttention(4, 1, 4)
    for parameter in mixer.parameters():
        torch.nn.init.eye_(parameter)
    out = mixer(torch.full((1, 3, 4), -30.0), torch.arange(3).unsqueeze(0))
    torch.testing.assert_close(out, torch.full((1, 3, 4), -30.0))
