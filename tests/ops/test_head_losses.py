"""Losses straight from the head: against torch's own, and of a vocabulary that two ranks share against one rank's."""

from __future__ import annotations

from unittest import mock

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.ops import native
from moescale.ops.head_losses import head_losses, head_losses_reference
from moescale.parallel.ranks import run_ranks
from tests.support.memory import Memory
from tests.support.threads import torch_threads

VOCAB, TOKENS = 11, 9
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SPREAD = {torch.float32: 9.0, torch.bfloat16: 0.5}  # bfloat16 rounds a logit of 100 to halves


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 90), st.sampled_from([1, 7, 300, 20_000]), st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([None, 1, 32]), st.sampled_from([0.0, 0.1]), st.sampled_from([*TOLERANCE]), st.booleans(),
)
def test_losses_equal_torchs(
    tokens: int, vocab: int, ignored: float, chunk: int | None, z_coefficient: float, dtype: torch.dtype, compiled: bool
) -> None:
    """Kept or computed again, with a compiler and without; in float32 logits so far apart that some probabilities are
    0; a weight wider than x."""
    torch.manual_seed(tokens)
    x, weight = torch.randn(tokens, 8).to(dtype), torch.randn(vocab, 8) * SPREAD[dtype]
    targets = torch.randint(vocab, (tokens,))
    targets[torch.rand(tokens) < ignored] = -100
    results = []
    for function, wide in ((head_losses, False), (head_losses_reference, True)):
        of_x = (x.double() if wide else x.clone()).requires_grad_()
        of_weight = (weight.to(dtype).double() if wide else weight.clone()).requires_grad_()
        arguments = {} if wide else {"chunk": chunk}
        library = native._library if compiled else lambda: None
        with mock.patch.object(native, "_library", library), torch_threads(2):
            loss, z = function(of_x, of_weight, targets, logit_scale=0.7, **arguments)
            gradients = torch.autograd.grad(loss * 0.3 + z * z_coefficient, (of_x, of_weight))
        results.append((loss.detach(), z.detach(), *gradients))
    assert [result.dtype for result in results[0]] == [torch.float32, torch.float32, dtype, torch.float32]
    for ours, exact in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - exact).norm() <= TOLERANCE[dtype] * max(exact.norm(), SPREAD[dtype])


def test_few_logits_are_in_memory_at_a_time() -> None:
    """Kept for backward where all fit into a chunk: then twice, as gradients beside; else those of a chunk, once."""
    logits = 4 * 512 * 1000
    for chunk, bound in ((512, 2.3 * logits), (64, 0.4 * logits)):
        with Memory() as memory:
            x, weight = torch.randn(512, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
            loss, _ = head_losses(x, weight, torch.zeros(512, dtype=torch.int64), chunk=chunk)
            loss.backward()
        assert memory.peak < bound


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(TOKENS, 8).to(dtype), torch.randn(VOCAB, 8).to(dtype)
    return x.requires_grad_(), weight, torch.tensor([0, 5, 6, 10, -100, 3, 7, 1, 10])


def part(bounds: list[int], dtypes: list[torch.dtype]) -> list[list[torch.Tensor]]:
    """Compute both losses in each dtype. -> them, the gradients of x (this rank's part) and of its rows of the head"""
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), []
    for dtype in dtypes:
        x, weight, targets = inputs(dtype)
        own = weight[bounds[rank] : bounds[rank + 1]].requires_grad_()
        loss, z = head_losses(x, own, targets, first_token=bounds[rank], group=dist.group.WORLD, chunk=4,
                              logit_scale=0.5)
        results.append([loss.detach(), z.detach(), *torch.autograd.grad(loss + 0.3 * z, (x, own))])
    return results


def test_two_ranks_share_the_vocabulary() -> None:
    """In float64, and in float32 by the compiled functions where there is a compiler."""
    dtypes = [torch.float64, torch.float32]
    for dtype, one, other in zip(dtypes, *run_ranks(2, part, [0, 6, VOCAB], dtypes), strict=True):
        x, weight, targets = inputs(dtype)
        loss, z = head_losses_reference(x, weight.requires_grad_(), targets, 0.5)
        of_x, of_weight = torch.autograd.grad(loss + 0.3 * z, (x, weight))
        for rank in (one, other):
            torch.testing.assert_close(rank[0], loss.detach())
            torch.testing.assert_close(rank[1], z.detach())
        torch.testing.assert_close(one[2] + other[2], of_x)
        torch.testing.assert_close(torch.cat((one[3], other[3])), of_weight)
