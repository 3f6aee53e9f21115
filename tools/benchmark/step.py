"""One training step beside transformers' Mixtral: the same weights, tokens and optimizer, in alternation.

    python tools/benchmark/step.py [--threads 2] [--rounds 15] [--compiled]
    python tools/benchmark/step.py --limit [--threads 2]            # our step, and what it multiplies, alone
    python tools/benchmark/step.py --engine [native zero1 zero3]    # engines beside each other, on 2 ranks with ep 2

Before timing, the losses and gradient norms of both are compared. transformers runs its `eager` and its `grouped_mm`
experts, in bfloat16 with bfloat16 weights and optimizer state, which is its fastest; MoEScale keeps float32 weights
and optimizer state in both. Its step computes the balance loss, transformers' does not. Prints medians, and how much
faster MoEScale is than the best of the others. With --compiled both run under torch.compile, too.

Engines take their steps in alternation too, each on 2 ranks of one thread, which wait for their turn. The limit is what
a step would take that did nothing but its matrix products, one after another on all threads, and its attention.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import MixtralConfig, MixtralForCausalLM

from moescale.config import Config, parse_config
from moescale.data.batches import Batch
from moescale.engine.base import Engine, build_engine
from moescale.engine.native import NativeEngine
from moescale.ops import native, shares
from moescale.optim.gradient_norm import clip_gradients
from moescale.parallel.mesh import start_mesh, stop_mesh

BATCH, SEQ = 8, 256
WARM_UP = 5
COMPETITORS = ("moescale", "eager", "grouped_mm")
COMPILED = ("eager, compiled", "grouped_mm, compiled")
ENGINES: dict[str, dict[str, Any]] = {
    "native": {}, **{f"zero{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)}}
RANKS = 2
MODEL = {"vocab_size": 1024, "d_model": 256, "num_layers": 4}
ATTENTION = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "window": 128, "rope_theta": 1e6}
MOE = {"num_experts": 8, "top_k": 2, "d_ff": 512}


def make_config(compute: str, ranks: int = 1, **run: Any) -> Config:
    return parse_config(
        {"run": run, "parallel": {"ep": ranks}, "precision": {"compute": compute},
         "model": MODEL, "attention": ATTENTION,
         "data": {"seq_len": SEQ, "global_batch": BATCH},
         "moe": {**MOE, "load_balance_coefficient": 0.0},  # computed all the same
         "optim": {"weight_decay": 0.0, "lr": 1e-4, "schedule": "constant"}}, "benchmark",
    ).for_world(ranks)


def make_peer(ours: nn.Module, experts: str, dtype: torch.dtype) -> MixtralForCausalLM:
    """Build transformers' Mixtral with our weights."""
    config = MixtralConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, sliding_window=128, num_local_experts=8, num_experts_per_tok=2,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=False,
        use_cache=False, router_jitter_noise=0.0, output_router_logits=False, attention_dropout=0.0,
    )
    config._experts_implementation = experts
    peer = MixtralForCausalLM(config)
    nn.Module.to(peer, dtype)
    weights = ours.state_dict()
    renamed = {
        "model.embed_tokens.weight": weights["embedding.weight"], "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["head.weight"],
    }
    for index in range(4):
        here, there = f"blocks.{index}.", f"model.layers.{index}."
        for name in "qkvo":
            renamed[f"{there}self_attn.{name}_proj.weight"] = weights[f"{here}mixer.{name}.weight"]
        renamed[there + "input_layernorm.weight"] = weights[here + "mixer_norm.weight"]
        renamed[there + "post_attention_layernorm.weight"] = weights[here + "channel_norm.weight"]
        renamed[there + "mlp.gate.weight"] = weights[here + "channel_mixer.router.weight"]
        expert = here + "channel_mixer.experts."
        renamed[there + "mlp.experts.gate_up_proj"] = torch.cat((weights[expert + "gate"], weights[expert + "up"]), 1)
        renamed[there + "mlp.experts.down_proj"] = weights[expert + "down"]
    peer.load_state_dict({name: weight.clone() for name, weight in renamed.items()})
    return peer.train()


def peer_step(peer: MixtralForCausalLM, tokens: Tensor) -> Callable[[], tuple[float, float]]:
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step() -> tuple[float, float]:
        loss = peer(input_ids=tokens, labels=tokens).loss  # predicts tokens 1 to SEQ-1 of each row
        loss.backward()
        norm = clip_gradients(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return step


def our_step(engine: Engine, tokens: Tensor, rank: int = 0, ranks: int = 1) -> Callable[[], tuple[float, float]]:
    targets = torch.cat((tokens[:, 1:], torch.full((BATCH, 1), -100)), 1)
    token_id = torch.arange(BATCH * SEQ).view(BATCH, SEQ)
    batch = Batch(*(part.chunk(ranks)[rank] for part in (tokens, targets, token_id % SEQ, token_id)))

    def step() -> tuple[float, float]:
        losses = engine.forward_backward([batch])
        return losses.cross_entropy.item(), engine.step().item()

    return step


def serve(name: str, compute: str, threads: int, pipe: Connection) -> None:
    """Run in a process of its own, so that no competitor warms or crowds the caches of another: a step a request."""
    torch.set_num_threads(threads)
    config = make_config(compute)
    engine = NativeEngine(config, start_mesh(config))
    tokens = torch.randint(1024, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    if name == "moescale":
        step = our_step(engine, tokens)
    else:
        torch.set_float32_matmul_precision("highest")  # as it is without us; what we set made their steps slower
        experts, _, compiled = name.partition(", ")
        peer = make_peer(engine.model, experts, getattr(torch, compute))
        if compiled:
            peer.compile()
        step = peer_step(peer, tokens)
    while pipe.recv():
        started = time.perf_counter()
        figures = step()
        pipe.send((time.perf_counter() - started, figures))


def serve_rank(name: str, compute: str, rank: int, port: int, pipe: Connection) -> None:
    """Be one of the ranks of an engine, which take a step a request."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    config = make_config(compute, RANKS, **ENGINES[name])
    engine = build_engine(config, start_mesh(config))
    tokens = torch.randint(1024, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    step = our_step(engine, tokens, rank, RANKS)
    while pipe.recv():
        started = time.perf_counter()
        figures = step()
        pipe.send((time.perf_counter() - started, figures))


def start_engine(name: str, compute: str) -> list[Connection]:
    """Start the ranks of an engine. -> a pipe to each"""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = []
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        context.Process(target=serve_rank, args=(name, compute, rank, port, theirs), daemon=True).start()
        pipes.append(ours)
    return pipes


def start_competitors(names: Sequence[str], compute: str, threads: int) -> dict[str, list[Connection]]:
    """Start moescale and transformers, each a process of its own. -> a pipe to each"""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in names:
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(name, compute, threads, theirs), daemon=True).start()
        pipes[name] = [ours]
    return pipes


def race(
    pipes: dict[str, list[Connection]], compute: str, rounds: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Check that all compute the same, then time in alternation. -> the median seconds and the first figures of each"""

    def request(name: str) -> tuple[float, tuple[float, float]]:
        for pipe in pipes[name]:
            pipe.send(True)
        answers = [pipe.recv() for pipe in pipes[name]]
        return max(seconds for seconds, _ in answers), answers[0][1]

    first = {name: request(name)[1] for name in pipes}
    tolerance = 1e-5 if compute == "float32" else 2e-2
    for name, values in first.items():
        for ours, other in zip(next(iter(first.values())), values, strict=True):
            assert abs(ours - other) <= tolerance * abs(ours), f"{compute}: {name} differs: {first}"
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for number in range(rounds + WARM_UP):
        for name in pipes:
            elapsed = request(name)[0]
            if number >= WARM_UP:
                seconds[name].append(elapsed)
    for pipe in (pipe for each in pipes.values() for pipe in each):
        pipe.send(False)
    return {name: statistics.median(values) for name, values in seconds.items()}, first


class Products(TorchDispatchMode):
    """Keeps the matrix products that torch is asked for, with their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            kept = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
            self.calls.append((function, *kept))
        return function(*args, **kwargs)


def compare_with_limit(compute: str, rounds: int, threads: int) -> list[str]:
    """Time our step, its products alone and its attention alone, in alternation. -> a row of the table"""
    torch.set_num_threads(threads)
    config = make_config(compute)
    engine = NativeEngine(config, start_mesh(config))
    step = our_step(engine, torch.randint(1024, (BATCH, SEQ), generator=torch.Generator().manual_seed(0)))
    step()
    with mock.patch.object(native, "call", side_effect=native.call) as calls:
        step()
    attention = [call.args for call in calls.call_args_list if call.args[0].startswith("attend")]
    with (  # step by step in Python, where products can be seen
        mock.patch.object(native, "_library", return_value=None), mock.patch.object(shares, "MOST_THREADS", 1),
        Products() as products,
    ):
        step()

    def multiply() -> None:
        with torch.no_grad():
            for function, args, kwargs in products.calls:
                function(*args, **kwargs)

    def attend() -> None:
        for each in attention:
            native.call(*each)

    seconds: dict[Callable[[], Any], list[float]] = {step: [], multiply: [], attend: []}
    for number in range(rounds + WARM_UP):
        for run, taken in seconds.items():
            started = time.perf_counter()
            run()
            if number >= WARM_UP:
                taken.append(time.perf_counter() - started)
    whole, *parts = (statistics.median(taken) for taken in seconds.values())
    stop_mesh()
    return [compute, *(f"{each * 1000:.0f} ms" for each in (whole, *parts)), f"{sum(parts) / whole:.2f}"]


def compare_engines(names: Sequence[str], compute: str, rounds: int) -> list[str]:
    """Time engines. -> a row of the table"""
    medians, first = race({name: start_engine(name, compute) for name in names}, compute, rounds)
    return [compute, *(f"{median * 1000:.0f} ms ({median / medians[names[0]]:.2f})" for median in medians.values()),
            " ".join(f"{values[0]:.6f}" for values in first.values())]


def compare(names: Sequence[str], compute: str, rounds: int, threads: int) -> list[str]:
    """Time moescale and transformers. -> a row of the table"""
    medians, first = race(start_competitors(names, compute, threads), compute, rounds)
    peer = min(median for name, median in medians.items() if name != "moescale")
    return [compute, *(f"{median * 1000:.0f} ms" for median in medians.values()), f"{peer / medians['moescale']:.2f}",
            f"{first['moescale'][0]:.6f} {first['grouped_mm'][0]:.6f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--engine", nargs="*", choices=ENGINES, metavar="NAME", help="native, zero0, ... zero3")
    parser.add_argument("--compiled", action="store_true", help="transformers under torch.compile beside the others")
    parser.add_argument("--limit", action="store_true", help="what our step multiplies, alone, beside it")
    arguments = parser.parse_args()
    if arguments.limit:
        table = Table("compute", "step", "products", "attention", "share of the step",
                      title=f"one training step, {BATCH} x {SEQ} tokens, {arguments.threads} threads, medians")
        for compute in ("float32", "bfloat16"):
            table.add_row(*compare_with_limit(compute, arguments.rounds, arguments.threads))
        Console(width=120).print(table)
        return
    if arguments.engine is not None:
        names = arguments.engine or ["native", "zero1", "zero3"]
        table = Table("compute", *names, "first losses", title=f"one training step, {BATCH} x {SEQ} tokens, ep {RANKS} "
                      f"on {RANKS} ranks, medians (over the first's)")
        for compute in ("float32", "bfloat16"):
            table.add_row(*compare_engines(names, compute, arguments.rounds))
        Console(width=120).print(table)
        return
    names = [*COMPETITORS, *(COMPILED if arguments.compiled else ())]
    table = Table("compute", *names, "ratio", "first loss, ours and theirs",
                  title=f"one training step, {BATCH} x {SEQ} tokens, {arguments.threads} threads, medians")
    for compute in ("float32", "bfloat16"):
        table.add_row(*compare(names, compute, arguments.rounds, arguments.threads))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
