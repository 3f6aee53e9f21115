"""What engines share, and what those share that run this project's layers, however they spread them over ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moescale.checkpoint.capture import Capture, HostCopy
from moescale.checkpoint.store import load_checkpoint, read_state
from moescale.config import Config
from moescale.data.batches import Batch
from moescale.engine.accounting import mixtures, routing_counts
from moescale.engine.base import Choices, Features, RoutingCounts
from moescale.engine.recording import recording
from moescale.model.language_model import LanguageModel, LossSums
from moescale.moe.layer import MoELayer
from moescale.optim.optimizer import count_from
from moescale.optim.schedule import Peak, first_peak, learning_rate
from moescale.parallel.balance import choices_counted, count_as_it_goes
from moescale.parallel.lost_ranks import where_in
from moescale.parallel.mesh import Mesh


class Standing(ABC):
    """The part of an engine that looks at schedule, step and counts alone; see `engine.base.Engine`."""

    def __init__(self, config: Config, mesh: Mesh, mixtures: Mapping[int, MoELayer]) -> None:
        """mixtures: by their index in the model, those whose statistics are counted on this rank."""
        self.config, self.mesh, self.mixtures = config, mesh, mixtures
        self.step_count = 0
        self.peak = first_peak(config.optim)

    def routing(self) -> RoutingCounts:
        return routing_counts(self.mixtures, self.config, self.mesh)

    @property
    def learning_rate(self) -> float:
        """The rate of the step to come."""
        return learning_rate(self.step_count, self.config.run.steps, self.config.optim, self.peak)

    # ---- checkpoints: the same keys under each engine

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """Make all that a checkpoint holds, by name: the engine's own tensors, or copies; all ranks must call."""

    @abstractmethod
    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        """Set what was read, where `_tensors` are copies. tensors: some of these, or all"""

    def capture(
        self, files: Mapping[str, str | bytes], state: Mapping[str, Any], host: HostCopy | None = None
    ) -> Capture:
        """Collect weights, optimizer state, step and where the learning rate falls from; all ranks must call.

        files, state: what else belongs to it.
        """
        tensors = self._tensors()
        return Capture(self.step_count, tensors if host is None else host.fill(tensors), {  # draws follow from the seed
            **state, "seed": self.config.run.seed, "peak": [self.peak.step, self.peak.share]}, files)

    def load(self, checkpoint: Path, peak: Peak | None = None) -> None:
        """Go on from a checkpoint, whatever engine and layout wrote it; a converted one may lack the optimizer's state.

        peak: where the learning rate falls from; None is after the warm-up.
        """
        prefix = "" if read_state(checkpoint).get("optimizer", True) else "model."
        tensors = {name: tensor for name, tensor in self._tensors().items() if name.startswith(prefix)}
        state = load_checkpoint(checkpoint, tensors, prefix=prefix, group=self.mesh.checkpoint_group)
        self._take(tensors)
        self._stand_at(state["step"], peak)

    def _stand_at(self, step: int, peak: Peak | None) -> None:
        """Go on from a step whose weights and moments were loaded. peak: None is after the warm-up"""
        self.step_count = step
        self.peak = peak or first_peak(self.config.optim)


class OwnLayers(Standing):
    """The part of an engine that looks at this project's layers."""

    optimizer: torch.optim.Optimizer

    def __init__(self, config: Config, mesh: Mesh, model: LanguageModel) -> None:
        super().__init__(config, mesh, mixtures(model))
        self.model = model

    @abstractmethod
    def _forward(self, batch: Batch) -> LossSums | None:
        """Run one micro-batch forward and return its sums, in a pipeline where the last stage is."""

    def record(
        self, *, training: bool, choices: Callable[[Choices], None] | None = None,
        features: Callable[[Features], None] | None = None,
        gradients: Callable[[Features], None] | None = None,
    ) -> AbstractContextManager[None]:
        return recording(self.model, training=training, choices=choices, features=features, gradients=gradients)

    def where(self, error: BaseException) -> str:
        return where_in(error, self.model)

    @torch.no_grad()
    def _balance_over_global_batch(self, batches: Sequence[Batch], *, in_concert: bool = False) -> None:
        """Let each router know the shares of its choices in the global batch before the first backward needs them.

        With several passes, or in a pipeline, that takes one more forward pass of every micro-batch. Routing is a
        function of weights and tokens, random draws included, so that the passes to come choose the same again.
        in_concert: whether they run in a pipeline.
        """
        if len(batches) == 1 and not in_concert:
            return count_as_it_goes(self.model, self.mesh.world_group)
        with choices_counted(self.model, self.config, self.mesh.world_group):
            for batch in batches:
                self._forward(batch)

    def _stand_at(self, step: int, peak: Peak | None) -> None:
        super()._stand_at(step, peak)
        count_from(self.optimizer, step)
