"""Recurrence over segments, straight from Transformer-XL (Dai et al., 2019, section 3.2): a loop with a cache."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moescale.config import ConfigError, parse_config
from moescale.mixers.attention import Attention
from moescale.ops.attention import attention
from moescale.ops.attention_pattern import Visibility
from tests.papers import formulas

D_MODEL, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 12, 4, 2, 8, 150
DOCUMENTS = [[0, 41, 60], [0]]  # where they begin, in each row


def layers(**keys: Any) -> nn.ModuleList:
    torch.manual_seed(1)
    made = nn.ModuleList(Attention(D_MODEL, HEADS, KV_HEADS, HEAD_DIM, **keys) for _ in range(2)).double()
    for weight in made.parameters():
        nn.init.normal_(weight, 0.0, 0.3)
    return made


def through(made: nn.ModuleList, x: Tensor) -> Tensor:
    positions = torch.empty(x.shape[:2], dtype=torch.int64)
    for row, begins in zip(positions, DOCUMENTS, strict=True):
        for first, last in pairwise([*begins, LENGTH]):
            row[first:last] = torch.arange(last - first)
    for layer in made:
        x = x + layer(x, positions)
    return x


def paper(made: nn.ModuleList, x: Tensor, size: int, memory: int, *, theta: float | None, alibi: bool) -> Tensor:
    """Go over each document's segments, each layer over those that it remembers and its own."""
    outs = []
    for row, begins in zip(x, DOCUMENTS, strict=True):
        for first, last in pairwise([*begins, LENGTH]):
            cache = [row[:0]] * len(made)  # of inputs that each layer had before
            for begin in range(first, last, size):
                h = row[begin : min(begin + size, last)]
                for number, layer in enumerate(made):
                    kept = cache[number].detach()
                    together = torch.cat((kept, h))
                    cache[number] = together[max(0, len(together) - memory) :] if memory else h[:0]
                    h = h + over_memory(layer, together, len(kept), theta=theta, alibi=alibi)
                outs.append(h)
    return torch.cat(outs).view_as(x)


def over_memory(layer: Any, together: Tensor, before: int, *, theta: float | None, alibi: bool) -> Tensor:
    """Attend from the inputs behind the first so many to all up to themselves."""
    heads, later = [], torch.ones(len(together), len(together)).triu(1).bool()
    apart = (torch.arange(len(together)).unsqueeze(1) - torch.arange(len(together))).double()
    for head in range(HEADS):
        part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        shared = head // (HEADS // KV_HEADS)
        kv_part = slice(shared * HEAD_DIM, (shared + 1) * HEAD_DIM)
        q, k, v = (together @ each.T for each in (
            layer.q.weight[part], layer.k.weight[kv_part], layer.v.weight[kv_part]))
        if theta is not None:  # distances alone count, so that places among these are as good as any
            q, k = formulas.rotate(q, theta), formulas.rotate(k, theta)
        scores = q @ k.T / math.sqrt(HEAD_DIM)
        if alibi:
            scores = scores - 2 ** (-8 * (head + 1) / HEADS) * apart
        heads.append((scores.masked_fill(later, -torch.inf).softmax(-1) @ v)[before:])
    return torch.cat(heads, -1) @ layer.o.weight.T


@pytest.mark.parametrize(("size", "memory", "theta", "alibi"), [
    (16, 16, None, True), (10, 23, 100.0, False), (37, 5, None, False), (1, 4, None, True), (64, 64, 10_000.0, False),
    (9, 0, None, True), (200, 30, None, True)])
def test_segments_are_the_papers_loop(size: int, memory: int, theta: float | None, alibi: bool) -> None:
    """Outputs and every gradient: of both layers' matrices, and of the inputs, which memory gives none."""
    made = layers(visibilities=[Visibility(block_size=size, memory=memory)], rope_theta=theta, alibi=alibi)
    torch.manual_seed(2)
    x, grad = torch.randn(2, 2, LENGTH, D_MODEL, dtype=torch.float64)
    x.requires_grad_()
    results = []
    for out in (through(made, x), paper(made, x, size, memory, theta=theta, alibi=alibi)):
        results.append((out, *torch.autograd.grad(out, (x, *made.parameters()), grad)))
    for ours, theirs in zip(*results, strict=True):
        tolerance = 1e-11 if theta is None else 4e-6  # the angles of positions are float32 in ours
        assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < tolerance


def test_what_segments_become_at_their_ends() -> None:
    """No memory makes blocks, one segment makes all before it: the same numbers, bit by bit."""
    torch.manual_seed(3)
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    for keys, same in (({"block_size": 20, "memory": 0}, {"block_size": 20}), ({"block_size": 150, "memory": 9}, {})):
        results = []
        for seen in (Visibility(**keys), Visibility(**same)):  # type: ignore[arg-type]
            made = layers(visibilities=[seen], alibi=True)
            out = through(made, x)
            results.append((out, *torch.autograd.grad(out.square().sum(), tuple(made.parameters()))))
        assert all(torch.equal(ours, other) for ours, other in zip(*results, strict=True))


def test_no_gradient_reaches_what_came_before_the_segment() -> None:
    made = layers(visibilities=[Visibility(block_size=30, memory=60)], alibi=True)
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64, requires_grad=True)
    found, = torch.autograd.grad(through(made, x)[1, 100:110].square().sum(), x)
    assert found[1, 90:110].any(-1).all()  # the segment begins at 90
    assert not found[1, :90].any()
    with torch.no_grad():  # but outputs depend on it
        changed = x.clone()
        changed[1, 31:60] += 1
        moved = (through(made, changed) - through(made, x))[1].any(-1)
    assert moved[31:].all()
    assert not moved[:31].any()


@pytest.mark.parametrize("backend", ["sdpa", "blocks", "chunked"])
def test_every_backend_parts_the_gradients_alike(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescale.ops.attention_chunked.CHUNK", 32)
    torch.manual_seed(4)
    positions = torch.stack((torch.arange(LENGTH), torch.cat((torch.arange(70), torch.arange(LENGTH - 70)))))
    for seq_q, keys in ((LENGTH, (20, 33)), (71, (64, 64)), (LENGTH, (7, 1))):
        q, k, v = (torch.randn(2, seq, heads, 8, dtype=torch.float64, requires_grad=True)
                   for seq, heads in ((seq_q, 4), (LENGTH, 2), (LENGTH, 2)))
        remembered = k.detach().requires_grad_(), v.detach().requires_grad_()
        grad, results = torch.randn_like(q), []
        for name in (backend, "reference"):
            out = attention(q, k, v, block_size=keys[0], memory=keys[1], remembered=remembered, positions=positions,
                            alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4]), backend=name)  # type: ignore[arg-type]
            results.append((out, *torch.autograd.grad(out, (q, k, v, *remembered), grad)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
        assert results[1][4].any()


@pytest.mark.parametrize(("keys", "message"), [
    ({"memory": 8}, "attention.memory=8 is what lies before a block: write attention.block_size, or"),
    ({"memory": 8, "block_size": 8, "window": 4}, "goes with blocks alone: write attention.window=null"),
    ({"memory": 8, "block_size": 8, "global_tokens": 2}, "attention.global_tokens=0, or attention.memory=0"),
])
def test_what_memory_goes_with(keys: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"attention": keys}, "test")
