"""Dispatchers against one process that holds all tokens and experts, and against the least that must travel."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moescale.comm.exchange import AllToAll, CommunicationError, Pausing, take_turns
from moescale.comm.sequence_shards import SequenceShards
from moescale.moe.budget import RowBudget
from moescale.moe.dispatchers import Dispatcher
from moescale.moe.experts import Experts
from moescale.moe.hops import Hop
from moescale.moe.layer import MoELayer
from moescale.moe.routing import Routing, sort_by_expert
from moescale.ops.permute import permute, unpermute
from moescale.parallel.ranks import RanksError, run_ranks

EXPERTS, TOP_K, D_MODEL, D_FF = 8, 3, 16, 8
COUNTS = {"equal": (6, 6, 6, 6), "one rank has none": (5, 0, 7, 2), "one token in all": (0, 0, 1, 0), "none": (0,) * 4}
LOADS = ("drawn", "one expert", "one expert has none", "some dropped")
KINDS = ("all_to_all", "hierarchical", "all_gather")


class GivenRouter(nn.Module):
    """Routes as it is told. weight: [tokens, top_k]"""

    def __init__(self, expert: Tensor, weight: Tensor, kept: Tensor) -> None:
        super().__init__()
        self.num_experts, self.sequence = EXPERTS, SequenceShards()
        self.expert, self.weight, self.kept = expert, nn.Parameter(weight), kept

    def forward(self, x: Tensor, token_id: Tensor) -> tuple[Routing, Tensor]:
        return sort_by_expert(self.expert, self.weight, self.kept, EXPERTS), x.new_zeros(2)

    def observe(self, observer: Callable[[Tensor, Tensor], None]) -> None:
        """Show no probabilities: there are none."""

    def dropped(self, routing: Routing, valid: Tensor) -> Tensor:
        return valid.new_zeros((), dtype=torch.int64)

    def wanted_rows(self, tokens: Tensor) -> Tensor:
        return tokens * TOP_K

    def total_slots(self, valid_whole: Tensor) -> Tensor:
        return valid_whole.new_zeros((), dtype=torch.float64)


def make_routing(tokens: int, load: str) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts, some of which are dropped. -> expert, weight, kept: [tokens, top_k]"""
    scores, kept = torch.rand(tokens, EXPERTS), torch.ones(tokens, TOP_K, dtype=torch.bool)
    if load == "one expert has none":
        scores[:, 5] = -1
    expert = scores.argsort(dim=1, descending=True)[:, :TOP_K]
    if load == "one expert":
        expert[:, 0], kept[:, 1:] = 6, False
    if load == "some dropped":
        kept = torch.rand(tokens, TOP_K) < 0.5
    return expert, torch.rand(tokens, TOP_K), kept


def whole_layer(counts: tuple[int, ...], load: str) -> tuple[MoELayer, Tensor]:
    """Make the layer of one process, and its tokens, which need a gradient."""
    torch.manual_seed(len(load) + sum(counts))
    experts = Experts(EXPERTS, D_MODEL, D_FF, "swiglu")
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.3)
    return MoELayer(GivenRouter(*make_routing(sum(counts), load)), experts), torch.randn(1, sum(counts), D_MODEL)


def step(layer: MoELayer, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Run forward and backward. -> the output, and the gradients of tokens, routing weights and experts"""
    x = x.clone().requires_grad_()
    y, _ = layer(x, torch.arange(x.shape[1]).unsqueeze(0))
    y.backward(grad)
    experts = [weight.grad for weight in layer.experts.parameters()]
    assert x.grad is not None
    assert all(weight is not None for weight in experts), "every expert has a gradient"
    return [y.detach(), x.grad, layer.router.weight.grad, *experts]


def make_hops(kind: str, etp: int = 1) -> list[Hop]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if kind == "hierarchical":  # two nodes
        node = ranks // 2
        within = [dist.new_group([first, first + 1][:node]) for first in range(0, ranks, node)]
        among = [dist.new_group([place, node + place]) for place in range(node)]
        return [Hop(among[rank % node], label="among nodes"),
                Hop(within[rank // node], etp=etp, label="within the node")]
    return [Hop(dist.group.WORLD, etp=etp, to_all=kind == "all_gather")]


def cut(whole: MoELayer, counts: tuple[int, ...], etp: int) -> tuple[MoELayer, slice]:
    """Cut this rank's part of the layer. -> it, and which tokens belong to this rank"""
    rank, owners = dist.get_rank(), dist.get_world_size() // etp
    first = sum(counts[:rank])
    own = slice(first, first + counts[rank])
    router, size, features = whole.router, EXPERTS // owners, D_FF // etp
    mine = slice(rank // etp * size, (rank // etp + 1) * size)
    hidden = slice(rank % etp * features, (rank % etp + 1) * features)
    experts = Experts(size, D_MODEL, features, "swiglu")
    for name, weight in experts.named_parameters():
        full = getattr(whole.experts, name).data[mine]
        weight.data.copy_(full[:, :, hidden] if name == "down" else full[:, hidden])
    return MoELayer(GivenRouter(router.expert[own], router.weight.data[own], router.kept[own]), experts), own


def run_cases(cases: list[tuple[str, int, int, str, str]]) -> None:
    """Compare this rank's part of each case with the same part of one process's."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, hops = dist.get_rank(), {(kind, etp): make_hops(kind, etp) for kind, _, etp, _, _ in cases}
    for case in cases:
        kind, chunks, etp, counts_name, load = case
        counts = tuple(COUNTS[counts_name][: dist.get_world_size()])
        whole, x = whole_layer(counts, load)
        grad = torch.randn_like(x)
        layer, own = cut(whole, counts, etp)
        expected = step(whole, x, grad)
        layer.dispatcher, layer.chunks = Dispatcher(hops[kind, etp]), chunks
        got = step(layer, x[:, own], grad[:, own])
        size, features = EXPERTS // (dist.get_world_size() // etp), D_FF // etp
        mine = slice(rank // etp * size, (rank // etp + 1) * size)
        hidden = slice(rank % etp * features, (rank % etp + 1) * features)
        gate, up, down = (part[mine] for part in expected[3:])
        parts = [expected[0][:, own], expected[1][:, own], expected[2][own], gate[:, hidden], up[:, hidden],
                 down[:, :, hidden]]
        for ours, theirs in zip(got, parts, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, case=case: f"{case} {text}")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_dispatcher_equals_one_process(ranks: int) -> None:
    cases = [(kind, chunks, 1, counts, load) for kind in KINDS for chunks in (1, 3) for counts in COUNTS
             for load in (LOADS if chunks == 1 else LOADS[-1:])]
    if ranks == 4:
        cases += [(kind, 2, 2, counts, "drawn") for kind in KINDS for counts in COUNTS]  # two ranks share each expert
    run_ranks(ranks, run_cases, cases)


def do_nothing(dispatcher: Dispatcher, x: Tensor, routing: Routing) -> Pausing:
    """Send tokens to their experts, each of which answers with what it was asked."""
    received, arrived, handle = yield from dispatcher.dispatch(x, routing)
    rows = permute(received, arrived.token, arrived.row)
    answers = unpermute(rows, arrived.weight, arrived.token, arrived.row)
    return (yield from dispatcher.combine(answers, handle))


def test_equal_weights_and_no_experts_are_the_identity() -> None:
    def identity() -> None:
        dist.init_process_group("gloo")
        for kind in KINDS:
            torch.manual_seed(dist.get_rank())
            expert, weight, kept = make_routing(5, "drawn")
            routing = sort_by_expert(expert, torch.full_like(weight, 1 / TOP_K), kept, EXPERTS)
            x = torch.randn(5, D_MODEL, requires_grad=True)
            (y,) = take_turns([do_nothing(Dispatcher(make_hops(kind)), x, routing)])
            torch.testing.assert_close(y, x)
            (grad,) = torch.autograd.grad(y.sum(), x)
            torch.testing.assert_close(grad, torch.ones_like(x))

    run_ranks(4, identity)


def count_bytes() -> dict[str, tuple[int, int]]:
    """Count bytes by kind of dispatcher. -> those that leave this rank (its node, if there are two), and the least"""
    dist.init_process_group("gloo")
    rank, sent, launch, figures = dist.get_rank(), Counter(), AllToAll._launch, {}

    def counting(self: AllToAll, rows: Tensor) -> Any:
        others = sum(number for place, number in enumerate(self.send) if place != dist.get_rank(self.group))
        if rows.shape[1:] == (D_MODEL,):
            sent[self.label] += others * D_MODEL * rows.element_size()
        return launch(self, rows)

    AllToAll._launch = counting  # type: ignore[method-assign]
    for kind in ("all_to_all", "hierarchical"):
        whole, x = whole_layer((6, 6, 6, 6), "drawn")
        layer, own = cut(whole, (6, 6, 6, 6), 1)
        layer.dispatcher = Dispatcher(make_hops(kind))
        sent.clear()
        step(layer, x[:, own], torch.randn_like(x[:, own]))
        ranks_of = [{int(expert) // 2 for expert in chosen} for chosen in whole.router.expert]
        places = 4 if kind == "all_to_all" else 2
        homes = [{place * places // 4 for place in ranks} for ranks in ranks_of]
        rank_of = [token // 6 * places // 4 for token in range(24)]
        mine = rank * places // 4
        leaving = sum(len(homes[t] - {mine}) for t in range(own.start, own.stop))
        # answers to tokens of others; among nodes they leave from the rank that the token came to, one of its place
        came = range(24) if kind == "all_to_all" else [t for t in range(24) if t // 6 % 2 == rank % 2]
        answers = sum(mine in homes[t] for t in came if rank_of[t] != mine)
        label = "experts" if kind == "all_to_all" else "among nodes"
        figures[kind] = sent[label], 2 * (leaving + answers) * 4 * D_MODEL  # and the same in backward
    return figures


def test_what_travels_is_the_least_that_must() -> None:
    for figures in run_ranks(4, count_bytes):
        for kind, (sent, least) in figures.items():
            assert sent == least > 0, kind


@pytest.mark.parametrize("drop", [False, True])
def test_a_budget_bounds_rows_and_changes_nothing_but_what_it_drops(drop: bool) -> None:
    def budgeted() -> tuple[int, int, int]:
        dist.init_process_group("gloo")
        counts, most, seen = (6, 0, 6, 6), 0, 0
        whole, x = whole_layer(counts, "one expert")
        grad = torch.randn_like(x)
        layer, own = cut(whole, counts, 1)
        layer.dispatcher, layer.budget = Dispatcher(make_hops("all_to_all")), RowBudget(0.4, 3, drop, dist.group.WORLD)
        forward = layer.experts.forward

        def watch(x: Tensor, routing: Routing) -> Tensor:
            nonlocal most, seen
            most, seen = max(most, len(routing.token)), seen + len(routing.token)
            return forward(x, routing)

        layer.experts.forward = watch  # type: ignore[method-assign]
        got, expected = step(layer, x[:, own], grad[:, own]), step(whole, x, grad)
        kept = 1.0 if not drop else (got[0] != 0).any(-1, keepdim=True)
        torch.testing.assert_close(got[0], expected[0][:, own] * kept)
        torch.testing.assert_close(got[1], expected[1][:, own] * kept)
        lost = layer.statistics.dropped + layer.statistics.tokens_per_expert.sum()
        assert int(lost) == int(layer.router.kept.sum()), "load and drops are all there is"
        figure = int(layer.statistics.dropped if drop else layer.statistics.surplus)
        if drop:  # in evaluation nothing is
            got, expected = step(layer.eval(), x[:, own], grad[:, own]), step(whole.eval(), x, grad)
            torch.testing.assert_close(got[0], expected[0][:, own])
        return most, seen, figure

    results = run_ranks(4, budgeted)
    ceiling = 6  # 0.4 of 18 tokens x 3 choices over 4 ranks, rounded up
    assert max(most for most, _, _ in results) == ceiling
    assert sum(beyond for _, _, beyond in results) == 18 - ceiling
    if not drop:
        assert sum(seen for _, seen, _ in results) == 2 * 18, "forward, and again in backward"


@pytest.mark.parametrize(("fault", "said"), [
    ("killed", "MoE layer 7"), ("late", r"MoE layer 7: all-to-all, rows by rank: sends \[.*\], expects \[.*\]"),
    ("elsewhere", "rank 1 of the group sends rows of 8 features of 4 bytes from elsewhere in the model, 16 of 4 are"),
], ids=lambda text: text.split()[0])
def test_ranks_that_do_not_meet_end_with_rank_layer_and_sizes(tmp_path: Path, fault: str, said: str) -> None:
    def fail(self: AllToAll, rows: Tensor) -> Any:
        """In the midst of it: the sizes are exchanged, the rows do not come."""
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(6)

    def meet() -> None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=3))
        whole, x = whole_layer((6, 6), "drawn")
        layer, own = cut(whole, (6, 6), 1)
        label, begin = "MoE layer 7", time.monotonic()
        if dist.get_rank() == 1:
            if fault == "elsewhere":
                label, x = "MoE layer 8", x[:, :, :8]
            else:
                AllToAll._launch = fail  # type: ignore[method-assign]
        layer.dispatcher = Dispatcher([Hop(dist.group.WORLD, label=label)])
        try:
            step(layer, x[:, own], torch.randn_like(x[:, own]))
        except CommunicationError as error:
            if dist.get_rank() == 0:
                (tmp_path / "said").write_text(f"{time.monotonic() - begin:.1f} {error}")
        except Exception:
            assert dist.get_rank() == 1, "only the rank that fails may fail otherwise"

    with suppress(RanksError):  # that rank 1 died is no news
        run_ranks(2, meet)
    seconds, _, message = (tmp_path / "said").read_text().partition(" ")
    assert message.startswith("rank 0, ")
    assert re.search(said, message), message
    assert float(seconds) < 5
