"""Save and resume equals never having stopped, in the same layout bit for bit, in another to 1e-5."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from moescale.checkpoint.store import latest_checkpoint
from moescale.config import Config, parse_config
from moescale.data.batches import Batches
from moescale.data.token_file import prepare_tokens
from moescale.engine.native import NativeEngine
from moescale.generate import load_model
from moescale.parallel.mesh import start_mesh, stop_mesh, world_size
from moescale.parallel.ranks import run_ranks
from tests.support.groups import in_groups

STEPS = 6


def make_config(folder: Path, parallel: dict[str, int]) -> Config:
    return parse_config({
        "run": {"dir": str(folder), "steps": STEPS, "seed": 3},
        "data": {"files": [str(folder / "text/*.txt")], "cache_dir": str(folder / "cache"),
                 "seq_len": 32, "global_batch": 8, "micro_batch": 2},
        **in_groups({"vocab_size": 264, "d_model": 32, "num_layers": 2,
                     "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
                  "init": "fan_in", "window": 16, "pattern": [{"channel_mixer": "feed_forward"}, {}]}),
        "moe": {"num_experts": 12, "top_k": 2, "d_ff": 16, "router": "sigmoid_bias", "bias_update_rate": 0.01},
        "parallel": parallel, "optim": {"lr": 3e-3, "warmup_steps": 3}, "checkpoint": {"keep": 9},
    }, "test").for_world(world_size())


def run_steps(folder: Path, parallel: dict[str, int], resume: bool, save_at: int | None) -> dict:
    """Train to the last step, or to where it saves. -> the losses, every weight and moment at the end and as loaded"""
    config = make_config(folder, parallel)
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
        engine.save(folder, {"config.yaml": config.to_yaml()}, {})
    state = whole_tensors(engine)
    stop_mesh()
    return {"losses": losses, "state": state, "loaded": loaded}


def whole_tensors(engine: NativeEngine) -> dict[str, torch.Tensor]:
    return {name: getattr(t, "full_tensor", t.clone)().clone() for name, t in engine._tensors().items()}


LAYOUTS = [
    (1, {}), (2, {"ep": 2}), (4, {"tp": 2, "pp": 2}), (4, {"ep": 2, "dp_replicate": 2}),
    (4, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}), (2, {"ep": 1}), (2, {"pp": 2}),
]


def write_text(folder: Path) -> None:
    """Write the documents that are trained on: made-up, and the same in every call."""
    draw = random.Random(0)
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for number in range(40):
        words = (draw.choice(["routers", "send", "tokens", "to", "experts", "and", "back"]) for _ in range(200))
        (folder / f"text/{number}.txt").write_text(" ".join(words))


def run_joined(layout: tuple[int, dict], folder: Path, resume: bool, save_at: int | None) -> dict:
    """Return the first rank's losses, and the tensors of all ranks, which a pipeline spreads over some of them."""
    write_text(folder)
    results = run_ranks(layout[0], run_steps, folder, layout[1], resume, save_at)
    return {"losses": results[0]["losses"],
            **{key: {name: tensor for result in results for name, tensor in result[key].items()}
               for key in ("state", "loaded")}}


@pytest.mark.parametrize(("before", "after"), list(zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)), ids=str)
def test_resume_in_another_layout(tmp_path: Path, before: tuple, after: tuple) -> None:
    unbroken = run_joined(before, tmp_path, False, None)
    saved = run_joined(before, tmp_path, False, STEPS // 2)
    again = run_joined(before, tmp_path, True, None)
    assert saved["losses"] + again["losses"] == unbroken["losses"], "the same layout goes on bit for bit"
    for name, tensor in unbroken["state"].items():
        assert torch.equal(again["state"][name], tensor), name
    other = run_joined(after, tmp_path, True, None)
    assert other["losses"] == pytest.approx(unbroken["losses"][STEPS // 2 :], rel=1e-5)
    assert other["loaded"].keys() == saved["state"].keys()
    for name, tensor in saved["state"].items():
        assert torch.equal(other["loaded"][name], tensor), f"{name} came back different in another layout"


def test_load_gives_the_model_on_one_process(tmp_path: Path) -> None:
    write_text(tmp_path)
    saved = run_ranks(4, run_steps, tmp_path, {"ep": 4}, False, 2)[0]
    model, _, _ = load_model(tmp_path)
    tensors = model.state_dict()
    assert tensors["blocks.1.channel_mixer.router.expert_bias"].any(), "no buffer is left at its zeros"
    for name, tensor in tensors.items():
        assert torch.equal(tensor, saved["state"][f"model.{name}"])
    logits = model.logits(torch.zeros(2, 5, dtype=torch.int64))
    assert logits.shape == (2, 5, 264)
    assert logits.dtype == torch.float32
