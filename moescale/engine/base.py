"""Who runs a step. The trainer knows this seam and nothing behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from moescale.data.batches import Batch
from moescale.model.language_model import LanguageModel
from moescale.optim.schedule import Peak


@dataclass(frozen=True)
class StepLosses:
    """Means over the global batch, each a scalar float64.

    cross_entropy: nats a target. load_balance, router_z: a token and MoE layer, before their coefficients.
    """

    cross_entropy: Tensor
    load_balance: Tensor
    router_z: Tensor


class Engine(Protocol):
    """Holds the model and its optimizer on this rank."""

    model: LanguageModel
    step_count: int

    @property
    def learning_rate(self) -> float:
        """The rate of the step to come."""

    def forward_backward(self, batches: Sequence[Batch]) -> StepLosses:
        """Add up the gradients of this rank's micro-batches of one step, the global batch's on return."""

    def step(self) -> Tensor:
        """Clip, update every weight, clear the gradients. -> the gradient norm before clipping, scalar"""

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """-> cross entropy in nats a target, over all ranks' batches"""

    def save(self, run_dir: Path, files: Mapping[str, str | bytes], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint of this moment. files, state: small texts and values that belong to it."""

    def load(self, checkpoint: Path, peak: Peak | None = None) -> None:
        """Go on from a checkpoint, whatever layout wrote it. peak: where the learning rate falls from."""
