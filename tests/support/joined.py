"""A run of a few steps on several ranks, and the tensors of all of them brought together."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moescale.checkpoint.store import latest_checkpoint
from moescale.config import Config, parse_config
from moescale.data.batches import Batches
from moescale.data.token_file import prepare_tokens
from moescale.engine.native import NativeEngine
from moescale.parallel.mesh import start_mesh, stop_mesh, world_size
from moescale.parallel.ranks import run_ranks
from tests.support.groups import in_groups

STEPS = 6
NONE: Mapping[str, Any] = {}


def make_config(folder: Path, parallel: dict[str, int], optim: Mapping[str, Any]) -> Config:
    return parse_config({
        "run": {"dir": str(folder), "steps": STEPS, "seed": 3},
        "data": {"files": [str(folder / "text/*.txt")], "cache_dir": str(folder / "cache"),
                 "seq_len": 32, "global_batch": 8, "micro_batch": 2},
        **in_groups({"vocab_size": 264, "d_model": 32, "num_layers": 2,
                     "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
                  "init": "fan_in", "window": 16, "pattern": [{"channel_mixer": "feed_forward"}, {}]}),
        "moe": {"num_experts": 12, "top_k": 2, "d_ff": 16, "router": "sigmoid_bias", "bias_update_rate": 0.01},
        "parallel": parallel, "optim": {"lr": 3e-3, "warmup_steps": 3, **optim}, "checkpoint": {"keep": 9},
    }, "test").for_world(world_size())


def run_steps(
    folder: Path, parallel: dict[str, int], resume: bool, save_at: int | None, optim: Mapping[str, Any] = NONE,
) -> dict:
    """Train to the last step, or to where it saves. -> the losses, every weight and moment at the end and as loaded"""
    config = make_config(folder, parallel, optim)
    tokens = prepare_tokens(config.data).train
    batches = Batches(tokens, seq_len=32, global_batch=8, seed=3)
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    if resume:
        checkpoint = latest_checkpoint(folder)
        assert checkpoint is not None
        engine.load(checkpoint)
    loaded = whole_tensors(engine) if resume else {}
    losses = []
    while engine.step_count < (save_at or STEPS):
        part = batches.micro_batches(engine.step_count, mesh.batch_rank, mesh.batch_size, 2)
        losses.append(float(engine.forward_backward(part).cross_entropy))
        engine.step()
    if save_at:
        engine.evaluate(batches.micro_batches(0, mesh.batch_rank, mesh.batch_size, 2))
        engine.capture({"config.yaml": config.to_yaml()}, {}).write(folder, 9, mesh.checkpoint_group)
    state = whole_tensors(engine)
    stop_mesh()
    return {"losses": losses, "state": state, "loaded": loaded}


def whole_tensors(engine: NativeEngine) -> dict[str, torch.Tensor]:
    return {name: getattr(t, "full_tensor", t.clone)().clone() for name, t in engine._tensors().items()}


def write_text(folder: Path) -> None:
    """Write the documents that are trained on: made-up, and the same in every call."""
    draw = random.Random(0)
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for number in range(40):
        words = (draw.choice(["routers", "send", "tokens", "to", "experts", "and", "back"]) for _ in range(200))
        (folder / f"text/{number}.txt").write_text(" ".join(words))


def run_joined(
    layout: tuple[int, dict], folder: Path, resume: bool, save_at: int | None, optim: Mapping[str, Any] = NONE,
) -> dict:
    """Return the first rank's losses, and the tensors of all ranks, which a pipeline spreads over some of them."""
    write_text(folder)
    results = run_ranks(layout[0], run_steps, folder, layout[1], resume, save_at, optim)
    return {"losses": results[0]["losses"],
            **{key: {name: tensor for result in results for name, tensor in result[key].items()}
               for key in ("state", "loaded")}}
