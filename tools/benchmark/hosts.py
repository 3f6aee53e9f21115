"""A mixture of experts whose tokens cross slow links: straight, or to each host once; whole, or in
chunks.

    python tools/benchmark/hosts.py [--hosts 2] [--ranks 4] [--bandwidth 1gbit] [--within 10gbit]

Builds hosts as network namespaces (tools/cluster.py, as root) and times one layer's forward and
backward over all of their ranks, each dispatcher and number of chunks in alternation, after holding
their outputs and gradients to those of the first. Bytes are what the hosts' links carried, headers
among them. The time is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moescale.comm.placement import ExpertPlacement, HopPlan, Placement, Share
from moescale.moe.experts import Experts
from moescale.moe.layer import MoELayer
from moescale.moe.routers import ROUTERS, Capacity

sys.path.append(str(Path(__file__).parent.parent))
from cluster import LINK, Cluster

NUM_EXPERTS, TOP_K = 32, 8
D_MODEL, D_FF = 1024, 128
WAYS = [
    (dispatcher, chunks) for dispatcher in ("all_to_all", "hierarchical") for chunks in (1, 2, 4)
]
TOLERANCE = 1e-5  # of the norm of the difference over the norm


@dataclass
class Figures:
    """Of one way, a value a round. seconds: forward; forward and backward. sent_bytes: by all hosts
    together."""

    forward: list[float]
    both: list[float]
    sent_bytes: list[float]


def make_layer(dispatcher: str, chunks: int, groups: dict[str, dist.ProcessGroup]) -> MoELayer:
    """Make the same layer on every rank, with this rank's share of the experts."""
    torch.manual_seed(1)
    own: dict[str, Any] = {"normalize_weights": True}
    router = ROUTERS["mixtral"](
        D_MODEL,
        NUM_EXPERTS,
        TOP_K,
        capacity=Capacity(None),
        balance_over="sequence",
        jitter=0.0,
        salt=0,
        **own,
    )
    router.weight.data = torch.randn(NUM_EXPERTS, D_MODEL) * D_MODEL**-0.5
    rank, size = dist.get_rank(), dist.get_world_size()
    experts = Experts(NUM_EXPERTS // size, D_MODEL, D_FF, "swiglu")
    for weight in experts.parameters():
        whole = torch.randn(NUM_EXPERTS, *weight.shape[1:]) * weight.shape[-1] ** -0.5
        weight.data = whole.chunk(size)[rank].clone()
    layer = MoELayer(router, experts)
    among, within = HopPlan(groups["among"]), HopPlan(groups["within"])
    hops = (HopPlan(groups["all"]),) if dispatcher == "all_to_all" else (among, within)
    layer.attach(
        Placement(
            experts=ExpertPlacement(
                ep=Share(rank, size, groups["all"]), group=groups["all"], hops=hops, chunks=chunks
            )
        )
    )
    return layer


def link_bytes() -> int:
    """Count what this host has sent to others so far; only the first rank of a host knows."""
    first = os.environ["LOCAL_RANK"] == "0"
    return int(Path(f"/sys/class/net/{LINK}/statistics/tx_bytes").read_text()) if first else 0


def together(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    """Let all ranks know the sum or the maximum of a number of theirs."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return float(tensor)


def run(layer: MoELayer, x: Tensor, grad: Tensor) -> tuple[list[Tensor], float, float]:
    """Run forward and backward. -> output and gradients; seconds of forward, and of both"""
    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    dist.barrier()
    began = time.perf_counter()
    y, _ = layer(x.unsqueeze(0), torch.arange(len(x)).unsqueeze(0))
    forward = time.perf_counter() - began
    y.squeeze(0).backward(grad)
    both = time.perf_counter() - began
    gradients = [weight.grad for weight in (x, *layer.parameters())]
    return [y.detach(), *(grad for grad in gradients if grad is not None)], forward, both


def measure(rounds: int, tokens: int) -> None:
    """Hold all ways to the first and time them, as one rank; rank 0 prints the figures as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size, node = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    rank = dist.get_rank()
    groups = {"all": dist.new_group(range(size))}
    for name, members in (
        ("within", [range(first, first + node) for first in range(0, size, node)]),
        ("among", [range(place, size, node) for place in range(node)]),
    ):
        made = [dist.new_group(ranks) for ranks in members]
        groups[name] = next(
            group for group, ranks in zip(made, members, strict=True) if rank in ranks
        )
    generator = torch.Generator().manual_seed(2 + rank)
    x, grad = (torch.randn(tokens, D_MODEL, generator=generator) for _ in range(2))
    layers = [make_layer(*way, groups) for way in WAYS]
    exact = run(layers[0], x, grad)[0]
    for way, layer in zip(WAYS, layers, strict=True):
        for got, wanted in zip(run(layer, x, grad)[0], exact, strict=True):
            error = float((got - wanted).norm() / wanted.norm())
            assert error < TOLERANCE, f"{way}: {error}"
    figures = [Figures([], [], []) for _ in WAYS]
    for _ in range(rounds):
        for layer, figure in zip(layers, figures, strict=True):
            before = link_bytes()
            _, forward, both = run(layer, x, grad)
            figure.forward.append(together(forward, dist.ReduceOp.MAX))
            figure.both.append(together(both, dist.ReduceOp.MAX))
            figure.sent_bytes.append(together(link_bytes() - before, dist.ReduceOp.SUM))
    if rank == 0:
        print(
            json.dumps(
                [
                    [
                        statistics.median(values)
                        for values in (figure.forward, figure.both, figure.sent_bytes)
                    ]
                    for figure in figures
                ]
            )
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=4, help="on each host")
    parser.add_argument("--bandwidth", default="1gbit")
    parser.add_argument("--within", default="10gbit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="of each rank")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        return measure(given.rounds, given.tokens)
    with Cluster(given.hosts, given.bandwidth, given.within) as cluster:
        if cluster.reason is not None:
            sys.exit(f"links need network namespaces: {cluster.reason}")
        said = cluster.folder / "said"
        started = []
        for rank in range(given.hosts * given.ranks):
            host, place = divmod(rank, given.ranks)
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(given.hosts * given.ranks),
                "LOCAL_RANK": str(place),
                "LOCAL_WORLD_SIZE": str(given.ranks),
                "MASTER_ADDR": cluster.name(0),
                "MASTER_PORT": "29500",
                "OMP_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
            }
            output = said.open("w") if rank == 0 else None
            words = ["--rank", "--rounds", str(given.rounds), "--tokens", str(given.tokens)]
            command = [sys.executable, __file__, *words]
            started.append(cluster.start(host, command, environment, output))
        failed = [process.wait() for process in started]
        text = said.read_text()
        if any(failed):
            sys.exit(text)
    tabulate(json.loads(text.splitlines()[-1]), given)


def tabulate(figures: list[list[float]], given: argparse.Namespace) -> None:
    table = Table(
        "dispatcher",
        "chunks",
        "forward, ms",
        "forward and backward, ms",
        "between hosts, MB",
        title=f"{given.hosts} hosts of {given.ranks} ranks, {given.bandwidth} between, "
        f"{given.within} within",
    )
    for (dispatcher, chunks), (forward, both, sent) in zip(WAYS, figures, strict=True):
        table.add_row(
            dispatcher,
            str(chunks),
            f"{1000 * forward:,.0f}",
            f"{1000 * both:,.0f}",
            f"{sent / 1e6:.1f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
