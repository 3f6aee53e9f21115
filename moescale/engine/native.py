"""The engine on torch's own parts: FSDP2, DTensor experts, distributed checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moescale.config import Config
from moescale.data.batches import Batch
from moescale.engine.accounting import (
    StepAccount,
    begin_statistics,
    mean_cross_entropy,
    move_biases,
)
from moescale.engine.base import StepLosses
from moescale.engine.own_layers import OwnLayers
from moescale.model.language_model import LanguageModel, LossSums
from moescale.optim.base import OPTIMIZERS
from moescale.optim.gradient_norm import SpoiltGradients, clip_gradients
from moescale.optim.optimizer import build_optimizer, count_from, set_rate
from moescale.parallel.mesh import Mesh
from moescale.parallel.parallelize import build_parallel_model
from moescale.spec.model import describe


class NativeEngine(OwnLayers):
    """Runs steps on this rank. config: settled by `Config.for_world`."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        parallel_model = build_parallel_model(config, mesh)
        super().__init__(config, mesh, parallel_model.whole)
        self.pieces = parallel_model.pieces
        self.pipeline = None
        if config.parallel.pp > 1:
            from moescale.parallel.pipeline import Pipeline

            self.pipeline = Pipeline(self.pieces, config, mesh)
        self.optimizer = build_optimizer(self.model, describe(config), config.optim)
        self.spoilt_gradients = SpoiltGradients()

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def forward_backward(self, batches: Sequence[Batch], *, watch: bool = True) -> StepLosses:
        """Add up the gradients of this rank's micro-batches; those of a pipeline run in concert."""
        for piece in self.pieces:
            piece.train()
        if self.config.moe.balance_over == "global_batch":
            self._balance_over_global_batch(batches, in_concert=self.pipeline is not None)
            self._reshard()
        begin_statistics(self.mixtures, watch=watch)
        account = StepAccount(batches, self.config, self.mesh)
        if self.pipeline is not None:
            self.pipeline.forward_backward([vars(batch) for batch in batches], account.loss)
            self.pipeline.tie()
        else:
            (piece,) = self.pieces
            for index, batch in enumerate(batches):
                last = index == len(batches) - 1
                if isinstance(piece, FSDPModule):
                    piece.set_requires_gradient_sync(last)
                for module in (piece, piece.embedding):
                    if isinstance(module, FSDPModule):
                        module.set_reshard_after_backward(last, recurse=False)  # the next pass begins with these
                account.loss(_run(piece, batch)).backward()
        return account.means()

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad()

    def step(self, guard: Tensor | None = None) -> Tensor:
        """Clip, update every weight and expert bias, clear the gradients; return the gradient norm before clipping.

        guard: leaves the update out where it or the norm is no finite number, at the price of waiting for the device.
        """
        optim = self.config.optim
        norm = clip_gradients(
            self.model.parameters(), optim.clip_norm, copies=() if self.pipeline is None else self.pipeline.copies,
            group=None if self.pipeline is None else self.pipeline.group, spoilt=self.spoilt_gradients,
        )
        updates = guard is None or self._are_finite(guard, norm)
        if updates:
            set_rate(self.optimizer, self.learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad()
        if updates:
            move_biases(self.mixtures, self.config, self.mesh)
        self.step_count += 1
        if not updates:
            count_from(self.optimizer, self.step_count)  # as a run that goes on from here would
        return norm

    def _are_finite(self, *figures: Tensor) -> bool:
        """Whether these are finite numbers on every rank."""
        finite = torch.stack([figure.isfinite() for figure in figures]).all().byte()
        if self.mesh.world_group is not None:
            dist.all_reduce(finite, dist.ReduceOp.MIN, group=self.mesh.world_group)
        return bool(finite)

    def spoilt(self) -> list[str]:
        """Name the weights whose gradients here were no finite numbers, in the first such step since the last call."""
        spoilt = {id(parameter) for parameter in self.spoilt_gradients.tell()}
        return [name for name, parameter in self.parameters().items() if id(parameter) in spoilt]

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Return the cross entropy in nats per target, over all ranks' batches."""
        for piece in self.pieces:
            piece.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            sums = self._forward(batch)
            if sums is not None:
                total += sums.cross_entropy
        self._reshard()
        return mean_cross_entropy(total, batches, self.mesh)

    def _forward(self, batch: Batch) -> LossSums | None:
        return self.pipeline.evaluate(vars(batch)) if self.pipeline is not None else _run(self.pieces[0], batch)

    def _reshard(self) -> None:
        """Let go of weights that stay gathered for a backward that does not come."""
        for module in (module for piece in self.pieces for module in piece.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        """Do nothing: they are the engine's own."""

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name; sharded tensors as DTensors."""
        tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        moments, parameters = OPTIMIZERS[self.config.optim.name].moments, self.parameters()
        for weight in describe(self.config).weights():
            name = ".".join(weight.name)
            for moment in moments(weight, self.config.optim) if name in parameters else ():
                tensors["optim." + ".".join(moment.name)] = self.optimizer.state[parameters[name]][moment.name[0]]
        return tensors


def _run(model: LanguageModel, batch: Batch) -> LossSums:
    return LossSums(*model(batch.tokens, targets=batch.targets, positions=batch.positions, token_id=batch.token_id))
