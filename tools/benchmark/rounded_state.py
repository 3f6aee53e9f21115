"""Loss curves of a small run whose optimizer state or whose gradients are rounded, beside the same run in float32.

    python tools/benchmark/rounded_state.py [moments | sums]

`moments` trains 200 steps on one rank with each optim.moments, `sums` 50 on two with each precision.reduce.

Every run has the same weights, text and order. Prints the loss over the last 20 steps, and how far a curve lies from
float32's: the mean and the largest distance, over all steps, of means over 20 steps. `nudged` is float32 with each
first weight changed by a millionth: as far apart as curves come that differ in nothing. `to nearest`, which is no
option, rounds moments to the nearest number.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moescale.config import Config, parse_config
from moescale.data.batches import Batches
from moescale.data.token_file import prepare_tokens
from moescale.engine.native import NativeEngine
from moescale.ops import native
from moescale.optim import adamw
from moescale.parallel.mesh import start_mesh, stop_mesh, world_size
from moescale.parallel.ranks import run_ranks

SEQ, BATCH, WINDOW = 128, 8, 20
MODEL: dict[str, Any] = {
    "model": {"vocab_size": 264, "d_model": 64, "num_layers": 2, "pattern": [{"channel_mixer": "moe"}]},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "moe": {"num_experts": 8, "top_k": 2, "d_ff": 64},
}
NEAREST, NUDGED = "to nearest", "nudged"
OPTIM: dict[str, Any] = {"lr": 1e-3, "warmup_steps": 20}
PLAIN = {"float32": "float32", NUDGED: "float32", "bfloat16": "bfloat16"}
RUNS: dict[str, dict[str, dict[str, Any]]] = {  # by what is rounded: the groups of each run beside those of all
    "moments": {f"{kind}, beta2 {beta}": {"optim": {**OPTIM, "moments": dtype, "betas": [0.9, beta]}}
                for beta in (0.95, 0.999)
                for kind, dtype in {**PLAIN, f"bfloat16 {NEAREST}": "bfloat16"}.items()},
    "sums": {f"{kind}, 2 ranks": {"optim": OPTIM, "precision": {"reduce": dtype}} for kind, dtype in PLAIN.items()},
}
RANKS_AND_STEPS = {"moments": (1, 200), "sums": (2, 50)}


def train(config: Config, steps: int, nudged: bool, nearest: bool) -> list[float]:
    """Train on this rank. Returns the loss of each step."""
    config = config.for_world(world_size())
    batches = Batches(prepare_tokens(config.data).train, seq_len=SEQ, global_batch=BATCH, seed=0)
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    if nudged:
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in engine.parameters().values():
                parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))
    losses = []
    with (
        mock.patch.object(adamw, "store_rounded", _to_nearest if nearest else adamw.store_rounded),
        mock.patch.object(native, "_library", (lambda: None) if nearest else native._library),
    ):
        for step in range(steps):
            part = batches.micro_batches(step, mesh.batch_rank, mesh.batch_size, BATCH // mesh.batch_size)
            losses.append(float(engine.forward_backward(part).cross_entropy))
            engine.step()
    stop_mesh()
    return losses


def _to_nearest(to: Tensor, values: Tensor, draws: Tensor) -> None:
    to.copy_(values)


def smooth(losses: list[float]) -> list[float]:
    """Average over windows that overlap."""
    return [statistics.fmean(losses[start : start + WINDOW]) for start in range(len(losses) - WINDOW + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounded", nargs="?", choices=RUNS, default="moments")
    rounded = parser.parse_args().rounded
    ranks, steps = RANKS_AND_STEPS[rounded]
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, groups in RUNS[rounded].items():
            config = parse_config({
                **MODEL, **groups, "run": {"steps": steps},
                "data": {"seq_len": SEQ, "global_batch": BATCH, "cache_dir": cache}}, "benchmark")
            curves[name] = run_ranks(ranks, train, config, steps, NUDGED in name, NEAREST in name)[0]
    print(f"{steps} steps, torch {torch.__version__}")
    _show(curves)


def _show(curves: Mapping[str, list[float]]) -> None:
    for name, losses in curves.items():
        plain = smooth(curves[f"float32{name[name.index(','):]}"])
        apart = [abs(one - other) for one, other in zip(smooth(losses), plain, strict=True)]
        print(f"{name:34} loss {statistics.fmean(losses[-WINDOW:]):.4f}   from float32 {statistics.fmean(apart):.4f}, "
              f"at most {max(apart):.4f}")


if __name__ == "__main__":
    main()
