"""Runs of a few steps under any engine, on ranks that are forked here, and what of them is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moescale.config import Config, parse_config
from moescale.data.batches import Batch
from moescale.engine.base import Engine, build_engine
from moescale.parallel.mesh import Mesh, start_mesh, stop_mesh, world_size
from moescale.verify.observation import make_batches
from tests.support.groups import in_groups

SEQ, GLOBAL_BATCH, VOCAB = 24, 8, 264
MODEL = in_groups({"vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
                   "head_dim": 8, "init": "fan_in", "pattern": [{"channel_mixer": "feed_forward"}, {}]})
MIXTURES: dict[str, dict[str, Any]] = {
    "dropless": {"num_experts": 8, "top_k": 2, "d_ff": 16, "router_z_coefficient": 1e-3},
    "capacity": {"num_experts": 8, "top_k": 2, "router": "gshard", "capacity_factor": 1.0, "d_ff": 16},
    "bias": {"num_experts": 8, "top_k": 2, "d_ff": 16, "router": "sigmoid_bias", "bias_update_rate": 0.01,
             "num_shared_experts": 1},
    "global": {"num_experts": 8, "top_k": 2, "d_ff": 16, "balance_over": "global_batch"},
    "pass": {"num_experts": 8, "top_k": 3, "d_ff": 16, "balance_over": "micro_batch", "normalize_weights": False},
    "none": {},
}
DENSE = {"model": {"pattern": [{"channel_mixer": "feed_forward"}], "tied_embeddings": True}}


@dataclass(frozen=True)
class Course:
    """What steps gave: losses (cross entropy, balance, router z), norms before clipping, weights at the end, whole."""

    losses: list[list[float]]
    norms: list[float]
    weights: dict[str, Tensor]


def make_config(
    mixture: str, parallel: Mapping[str, Any], compute: str = "float32", eps: float = 1e-8, **run: Any
) -> Config:
    """Settle a run of 20 steps on the ranks that there are, each with two micro-batches where the batch allows it.

    mixture: of MIXTURES; "none" is a dense model. eps: of AdamW
    """
    ranks = world_size() // parallel.get("cp", 1) // parallel.get("tp", 1) // parallel.get("pp", 1)
    model = {**MODEL, "model": {**MODEL["model"], **DENSE["model"]}} if mixture == "none" else MODEL
    return parse_config({
        **model, "moe": MIXTURES[mixture], "parallel": dict(parallel), "precision": {"compute": compute},
        "data": {"seq_len": SEQ, "global_batch": GLOBAL_BATCH, "micro_batch": max(1, GLOBAL_BATCH // ranks // 2)},
        "optim": {"lr": 3e-3, "warmup_steps": 3, "clip_norm": 0.5, "eps": eps}, "run": {"steps": 20, "seed": 5, **run},
    }, "test").for_world(world_size())


def batches_of(step: int, config: Config, mesh: Mesh, padding: bool = True) -> Sequence[Batch]:
    """Draw this rank's micro-batches of one step, in every other step fewer of them.

    padding: whether some tokens are, as in no training run
    """
    batch = make_batches(config, step)
    if not padding:
        batch = replace(batch, token_id=torch.arange(batch.tokens.numel()).view_as(batch.tokens))
    parts = [part.chunk(mesh.batch_size)[mesh.batch_rank].split(config.data.micro_batch or 1)
             for part in vars(batch).values()]
    batches = [Batch(*part) for part in zip(*parts, strict=True)]
    return batches[: max(1, len(batches) - step % 2)]


def take_steps(engine: Engine, config: Config, mesh: Mesh, steps: range, padding: bool = True) -> Course:
    """Train, and bring the weights of all ranks together."""
    losses, norms = [], []
    for step in steps:
        found = engine.forward_backward(batches_of(step, config, mesh, padding))
        losses.append([float(each) for each in (found.cross_entropy, found.load_balance, found.router_z)])
        norms.append(float(engine.step()))
    return Course(losses, norms, whole(engine.parameters()))


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the parts of tensors together, in copies."""
    return {name: getattr(tensor, "full_tensor", tensor.clone)().detach().clone() for name, tensor in tensors.items()}


def train_each(
    engines: Sequence[Mapping[str, Any]], mixture: str, parallel: Mapping[str, Any], compute: str = "float32",
    steps: int = 20, spoil: Callable[[], None] = lambda: None,
) -> list[Course]:
    """Train from the same first weights under each engine in turn. engines: keys of `run`. spoil: called before"""
    spoil()
    courses = []
    mesh = start_mesh(make_config(mixture, parallel, compute))
    for keys in engines:
        config = make_config(mixture, parallel, compute, **keys)
        torch.manual_seed(0)
        courses.append(take_steps(build_engine(config, mesh), config, mesh, range(steps)))
    stop_mesh()
    return courses


def difference(ours: Course, theirs: Course) -> dict[str, float]:
    """Compare two courses: the largest relative difference of losses, norms and any weight; NaN if any is."""
    losses = [abs(a - b) / abs(b) for mine, other in zip(ours.losses, theirs.losses, strict=True)
              for a, b in zip(mine, other, strict=True) if b != 0]
    norms = [abs(a - b) / b for a, b in zip(ours.norms, theirs.norms, strict=True)]
    assert ours.weights.keys() == theirs.weights.keys()
    weights = [float((ours.weights[name] - weight).norm() / weight.norm()) for name, weight in theirs.weights.items()]
    return {name: float(torch.tensor(found, dtype=torch.float64).max())
            for name, found in (("losses", losses), ("norms", norms), ("weights", weights))}
