"""Observes one training step: losses, counts, gradients, weights, and the features between sublayers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moescale.config import Config
from moescale.data.batches import Batch
from moescale.engine.native import NativeEngine
from moescale.model.block import Block
from moescale.moe.layer import MoELayer
from moescale.monitor.routing_metrics import WHOLE, routing_metrics
from moescale.parallel.mesh import Mesh


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
    engine = NativeEngine(config, mesh)
    observer = _Observer(engine.model, config)
    first = _copy({name: parameter.data for name, parameter in engine.model.named_parameters()})
    local = _local_batches(batches, mesh.batch_rank, mesh.batch_size, config.data.micro_batch)
    losses = engine.forward_backward(local)
    gradients = _copy({name: parameter.grad for name, parameter in engine.model.named_parameters()})
    metrics = routing_metrics(
        engine.model, mesh.world_group, num_layers=config.model.num_layers, num_experts=config.moe.num_experts)
    counts = {key: value for key, value in metrics.items() if key.endswith(WHOLE) and "/layer_" in key}
    norm = engine.step()
    updated = _copy({name: parameter.data for name, parameter in engine.model.named_parameters()})
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

    def __init__(self, model: nn.Module, config: Config) -> None:
        layers, tokens = config.model.num_layers, config.data.global_batch * config.data.seq_len
        self.d_model = config.model.d_model
        self.stream = torch.zeros(layers, 2, tokens, self.d_model, dtype=torch.float64)
        self.seen = torch.zeros(layers, 2, tokens, dtype=torch.int32)
        self.kept = torch.zeros(layers, tokens, config.moe.num_experts, dtype=torch.int32)
        self.closest = math.inf
        # the token ids of the block under way; None in what recompute runs again
        self.token_id: Tensor | None = None
        for name, module in model.named_modules():
            if isinstance(module, Block):
                self._watch(int(name.rpartition(".")[2]), module)

    def _watch(self, index: int, block: Block) -> None:
        def begin(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():  # not in a pass that counts choices alone
                self.token_id = block.sequence.own(inputs[2]).flatten()  # type: ignore[operator, union-attr]

        def mixed(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._write(norm, index, 0, inputs[0])

        def routed(router: nn.Module, inputs: object, outputs: tuple[Any, Tensor]) -> None:
            routing = outputs[0]
            if router.training and self.token_id is not None:
                expert = torch.arange(self.kept.shape[2]).repeat_interleave(routing.tokens_per_expert)
                one = torch.ones((), dtype=torch.int32)
                self.kept[index].index_put_((self.token_id[routing.token], expert), one, accumulate=True)

        def end(block: nn.Module, inputs: object, outputs: tuple[Tensor, Tensor]) -> None:
            self._write(block, index, 1, outputs[0])
            self.token_id = None

        block.register_forward_pre_hook(begin)
        if block.channel_norm is not None:
            block.channel_norm.register_forward_pre_hook(mixed)
        if isinstance(block.channel_mixer, MoELayer):
            router = block.channel_mixer.router
            router.register_forward_hook(routed)
            router.choose = partial(self._choose, router.choose, router.num_choices)  # type: ignore[method-assign]
        block.register_forward_hook(end)

    def _choose(
        self, choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], choices: int, logits: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        if logits.shape[-1] > 1 and self.token_id is not None and (self.token_id >= 0).any():
            best = logits.detach().flatten(0, 1)[self.token_id >= 0].sort(descending=True).values[:, : choices + 1]
            gap = (best[:, :-1] - best[:, 1:]).min() / best.abs().max()
            self.closest = min(self.closest, float(gap))
        return choose(logits, probs)

    @torch.no_grad()
    def _write(self, module: nn.Module, index: int, sublayer: int, x: Tensor) -> None:
        """Record features by token id. sublayer: 0 = mixer, 1 = channel mixer. x: [batch, seq/cp/tp, d_model]"""
        if module.training and self.token_id is not None:
            valid = self.token_id >= 0
            self.stream[index, sublayer, self.token_id[valid]] = x.flatten(0, 1)[valid].double()
            self.seen[index, sublayer, self.token_id[valid]] += 1
