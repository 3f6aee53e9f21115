"""Observes one training step: losses, counts, gradients, weights, and the features between sublayers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moescale.config import Config
from moescale.data.batches import Batch
from moescale.engine.base import Choices, Features, build_engine
from moescale.monitor.routing_metrics import WHOLE, routing_metrics
from moescale.parallel.mesh import Mesh

HALVES = ("mixer", "channel_mixer")  # of a block


@dataclass(frozen=True)
class Observation:
    """What one step shows on one rank.

    losses, counts: of all ranks together, by name. first, gradients, updated: this rank's part of every parameter
    before the step, of its gradient (which may be None), and after the step.
    stream: [layers, 2, tokens, d_model], the features of this rank's tokens after each mixer and each channel mixer.
    seen: [layers, 2, tokens] int32, how often each token passed. kept: [layers, tokens, experts] int32, assignments.
    closest: the smallest gap between two logits whose order decides where a token goes, over the largest logit.
    """

    losses: dict[str, float]
    counts: Mapping[str, list[int] | int]
    first: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    updated: dict[str, Tensor]
    stream: Tensor
    seen: Tensor
    kept: Tensor
    closest: float


def make_batches(config: Config, seed: int) -> Batch:
    """Draw a global batch with documents of unequal length, ignored targets, and a sequence that is nearly all padding.

    Its parts differ in their numbers of targets and of tokens, so that a mean of means is not the mean.
    """
    batch, seq, vocab = config.data.global_batch, config.data.seq_len, config.model.vocab_size
    generator = torch.Generator().manual_seed(seed)
    tokens = (torch.randn(batch, seq, generator=generator).abs() * vocab / 3).long().clamp(max=vocab - 1)
    targets = torch.cat((tokens[:, 1:], tokens[:, :1]), 1)
    share_ignored = torch.linspace(0, 0.3, batch).unsqueeze(1)
    targets[torch.rand(batch, seq, generator=generator) < share_ignored] = -100
    positions = torch.arange(seq).repeat(batch, 1)
    token_id = torch.arange(batch * seq).view(batch, seq)
    for row in range(batch):
        if row % 3:  # every third sequence is one document, so that a window matters at every distance
            begin = int(torch.randint(1, seq, (), generator=generator))
            positions[row, begin:] -= begin
        if row % 4 == 2 or row == batch - 1:
            length = 3 if row == batch - 1 else seq - seq // 4 - row % 5
            tokens[row, length:], targets[row, length:] = 0, -100
            positions[row, length:], token_id[row, length:] = 0, -1
    return Batch(tokens, targets, positions, token_id)


def observe_step(config: Config, mesh: Mesh, batches: Batch) -> Observation:
    """Take the first training step of a run on this rank's part of the batch, then evaluate.

    config: settled. batches: the global batch.
    """
    engine, observer = build_engine(config, mesh), _Observer(config)
    first = _copy(engine.parameters())
    local = _local_batches(batches, mesh.batch_rank, mesh.batch_size, config.data.micro_batch)
    with engine.record(training=True, choices=observer.choices, features=observer.features):
        losses = engine.forward_backward(local)
    gradients = _copy({name: parameter.grad for name, parameter in engine.parameters().items()})
    metrics = routing_metrics(engine.routing())
    counts = {key: value for key, value in metrics.items() if key.endswith(WHOLE) and "/layer_" in key}
    norm = engine.step()
    updated = _copy(engine.parameters())
    figures: dict[str, float | Tensor] = {
        "loss": losses.cross_entropy, "load-balance loss": losses.load_balance, "router z-loss": losses.router_z,
        "gradient norm": norm, "loss in evaluation": engine.evaluate(local),
    }
    return Observation({name: float(value) for name, value in figures.items()}, counts, first, gradients, updated,
                       observer.stream, observer.seen, observer.kept, observer.closest)


def _local_batches(batches: Batch, rank: int, num_ranks: int, micro_batch: int | None) -> Sequence[Batch]:
    parts = [part.chunk(num_ranks)[rank].split(micro_batch or len(part)) for part in vars(batches).values()]
    return [Batch(*part) for part in zip(*parts, strict=True)]


def _copy(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    return {name: None if tensor is None else tensor.detach().clone() for name, tensor in tensors.items()}


class _Observer:
    """Records the features between sublayers, token by token, while the model trains."""

    def __init__(self, config: Config) -> None:
        layers, tokens = config.model.num_layers, config.data.global_batch * config.data.seq_len
        self.stream = torch.zeros(layers, 2, tokens, config.model.d_model, dtype=torch.float64)
        self.seen = torch.zeros(layers, 2, tokens, dtype=torch.int32)
        self.kept = torch.zeros(layers, tokens, config.moe.num_experts, dtype=torch.int32)
        self.closest = math.inf

    def features(self, features: Features) -> None:
        half, valid = HALVES.index(features.after), features.token_id >= 0
        token_id = features.token_id[valid]
        self.stream[features.layer, half, token_id] = features.x[valid].double()
        self.seen[features.layer, half, token_id] += 1

    def choices(self, choices: Choices) -> None:
        token, choice = (choices.expert >= 0).nonzero(as_tuple=True)
        one = torch.ones((), dtype=torch.int32)
        self.kept[choices.layer].index_put_(
            (choices.token_id[token], choices.expert[token, choice]), one, accumulate=True)
        valid = choices.token_id >= 0
        if choices.scores is not None and choices.scores.shape[-1] > 1 and valid.any():
            ordered = choices.scores[valid].sort(descending=True).values
            best = ordered[:, : choices.expert.shape[1] + 1]
            gap = (best[:, :-1] - best[:, 1:]).min() / best.abs().max()
            self.closest = min(self.closest, float(gap))
