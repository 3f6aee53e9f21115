"""A recurrence over pieces of sequences on several ranks is the one that was never cut, and so are its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moescale.comm.sequence_shards import SequenceShards, SharedSequenceShards
from moescale.config import sequence_pieces
from moescale.parallel.context import deal_pieces
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from tests.support.layouts import make_config

CP, BATCH, SEQ, COUNT = 4, 3, 40, 7  # of 8 pieces each has 5 positions, fewer than COUNT
POSITIONS = torch.stack([torch.cat([torch.arange(size) for size in sizes])
                         for sizes in ((40,), (3, 30, 7), (10, 1, 1, 28))])


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Make decays by position, a matrix that is every position's, and what comes in: in each case of two features."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.rand(BATCH, SEQ, 2, generator=generator, dtype=torch.float64)
    matrix = torch.linalg.qr(torch.randn(2, 2, generator=generator, dtype=torch.float64))[0] * 0.98
    return decay, matrix, torch.randn(BATCH, SEQ, 2, generator=generator, dtype=torch.float64)


def mix(sequence: SequenceShards, decay: Tensor, matrix: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run a recurrence of factors, one of matrices on what it gives, and a window over its inputs, [batch, part, 2]."""
    decay, x = sequence.apart(decay), sequence.apart(x)
    begins = sequence.apart(sequence.part(POSITIONS)) == 0

    def factors(state: Tensor | None) -> tuple[Tensor, Tensor]:
        return loop(x, begins, state, lambda state, t: decay[:, t] * state)

    def matrices(state: Tensor | None) -> tuple[Tensor, Tensor]:
        return loop(first, begins, state, lambda state, t: state @ matrix)

    length = x.shape[1]
    first, _ = sequence.recur(factors, decay.prod(1), POSITIONS)
    second, last = sequence.recur(
        matrices, lambda state, positions: state @ torch.linalg.matrix_power(matrix, positions.shape[1]), POSITIONS)
    assert last.shape == (len(x), 2)
    window = torch.cat((sequence.before(x, COUNT), x), 1).unfold(1, COUNT + 1, 1).sum(-1)
    assert window.shape[1] == length
    return sequence.together(first), sequence.together(second), sequence.together(window)


def loop(x: Tensor, begins: Tensor, state: Tensor | None, step: Any) -> tuple[Tensor, Tensor]:
    state, outs = torch.zeros_like(x[:, 0]) if state is None else state, []
    for t in range(x.shape[1]):
        state = step(state, t).masked_fill(begins[:, t : t + 1], 0) + x[:, t]
        outs.append(state)
    return torch.stack(outs, 1), state


def one_rank(window: int | None) -> dict[str, Tensor]:
    """Run on this rank's part, and bring together outputs and gradients, each at its place in the whole."""
    pieces = deal_pieces(CP, sequence_pieces(CP, window))
    group = dist.group.WORLD
    sequence = SharedSequenceShards(pieces, dist.get_rank(), 0, 1, tp_group=None, cp_group=group, group=group)
    decay, matrix, x = make_inputs()
    inputs = [each.detach().requires_grad_() for each in (sequence.part(decay), matrix, sequence.part(x))]
    outs = mix(sequence, *inputs)
    weights = [sequence.part(weight(out)) for weight, out in zip(WEIGHTS, outs, strict=True)]
    grads = torch.autograd.grad(sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True)), inputs)
    dist.all_reduce(grads[1])
    named = {"factors": outs[0], "matrices": outs[1], "window": outs[2], "grad_decay": grads[0], "grad_x": grads[2]}
    return {**{name: sequence.whole(each.detach()) for name, each in named.items()}, "grad_matrix": grads[1]}


def weight_of(number: int) -> Any:
    return lambda out: torch.cos(torch.arange(BATCH * SEQ * 2, dtype=torch.float64) * (number + 1)).view(BATCH, SEQ, 2)


WEIGHTS = [weight_of(number) for number in range(3)]


def both_deals() -> list[dict[str, Tensor]]:
    mesh = start_mesh(make_config("mixtral", {}))
    assert mesh.world_size == CP
    found = [one_rank(window) for window in (None, 0)]
    stop_mesh()
    return found


def test_pieces_go_on_where_others_end() -> None:
    inputs = [each.requires_grad_() for each in make_inputs()]
    outs = mix(SequenceShards(), *inputs)
    grads = torch.autograd.grad(
        sum((out * weight(out)).sum() for out, weight in zip(outs, WEIGHTS, strict=True)), inputs)
    expected = dict(zip(("factors", "matrices", "window", "grad_decay", "grad_matrix", "grad_x"), (*outs, *grads),
                        strict=True))
    for found in (deal for rank in run_ranks(CP, both_deals) for deal in rank):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-12, atol=1e-12, msg=name)


def test_a_sequence_on_one_rank_goes_on_from_a_state() -> None:
    shards, x = SequenceShards(), torch.ones(1, 2, 3)
    first = torch.full((1, 3), 5.0)
    out, last = shards.recur(lambda state: (x, x[:, -1] if state is None else state), x[:, 0], POSITIONS, first)
    assert out is x
    assert last is first
    with pytest.raises(AssertionError, match="one process"):
        SharedSequenceShards([[0], [1]], 0, 0, 1, tp_group=None, cp_group=None, group=None).recur(
            lambda state: (x, x), x[:, 0], POSITIONS, first)
