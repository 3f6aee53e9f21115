"""Loss curves of a small run whose optimizer state is rounded, beside the same run in float32.

    python tools/benchmark/rounded_state.py [--steps 200]

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
from moescale.optim import adamw
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks

SEQ, BATCH, WINDOW = 128, 8, 20
MODEL: dict[str, Any] = {
    "model": {"vocab_size": 264, "d_model": 64, "num_layers": 2, "pattern": [{"channel_mixer": "moe"}]},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "moe": {"num_experts": 8, "top_k": 2, "d_ff": 64},
}
NEAREST, NUDGED = "to nearest", "nudged"
RUNS: dict[str, dict[str, Any]] = {  # keys of `optim` beside those of all runs
    f"{kind}, beta2 {beta}": {"moments": dtype, "betas": [0.9, beta]}
    for beta in (0.95, 0.999)
    for kind, dtype in (("float32", "float32"), (NUDGED, "float32"), ("bfloat16", "bfloat16"),
                        (f"bfloat16 {NEAREST}", "bfloat16"))
}


def train(config: Config, steps: int, nudged: bool, nearest: bool) -> list[float]:
    """Train on this rank. Returns the loss of each step."""
    config = config.for_world(1)
    batches = Batches(prepare_tokens(config.data).train, seq_len=SEQ, global_batch=BATCH, seed=0)
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    if nudged:
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in engine.parameters().values():
                parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))
    losses = []
    with mock.patch.object(adamw, "store_rounded", _to_nearest if nearest else adamw.store_rounded):
        for step in range(steps):
            part = batches.micro_batches(step, mesh.batch_rank, mesh.batch_size, BATCH)
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
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, optim in RUNS.items():
            config = parse_config({
                **MODEL, "optim": {"lr": 1e-3, "warmup_steps": 20, **optim}, "run": {"steps": arguments.steps},
                "data": {"seq_len": SEQ, "global_batch": BATCH, "cache_dir": cache}}, "benchmark")
            curves[name] = run_ranks(1, train, config, arguments.steps, NUDGED in name, NEAREST in name)[0]
    print(f"{arguments.steps} steps, torch {torch.__version__}")
    _show(curves)


def _show(curves: Mapping[str, list[float]]) -> None:
    for name, losses in curves.items():
        plain = smooth(curves[f"float32{name[name.index(','):]}"])
        apart = [abs(one - other) for one, other in zip(smooth(losses), plain, strict=True)]
        print(f"{name:34} loss {statistics.fmean(losses[-WINDOW:]):.4f}   from float32 {statistics.fmean(apart):.4f}, "
              f"at most {max(apart):.4f}")


if __name__ == "__main__":
    main()
