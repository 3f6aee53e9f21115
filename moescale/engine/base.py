"""Who runs a step. The trainer, proofs and reports know this seam and nothing behind it.

An engine is a row of ENGINES, a class in a file of its own that is imported when a run names it, and a name in
`run.engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from moescale.checkpoint.capture import Capture, HostCopy
from moescale.config import Config
from moescale.data.batches import Batch
from moescale.optim.schedule import Peak
from moescale.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepLosses:
    """Means over the global batch, each a scalar float64.

    cross_entropy: nats per target. load_balance, router_z: per token and MoE layer, before their coefficients.
    """

    cross_entropy: Tensor
    load_balance: Tensor
    router_z: Tensor


@dataclass(frozen=True)
class LayerCounts:
    """What the router of one layer did in the last step, to the tokens of all ranks.

    tokens_per_expert: rows of each expert. dropped: choices without a row, of `wanted` that could be. tokens: valid
    ones. entropy, confidence: of the router's probabilities in nats, and the largest of them, summed over tokens, as
    are its two losses. slots: of all experts, 0 without a capacity. surplus: rows that took a further pass, where there
    is a budget. other_ranks, other_nodes: tokens that travel there, and bytes_sent by dispatch to other ranks, where
    experts are spread. expert_bias: where there is one.
    """

    tokens_per_expert: list[int]
    dropped: int
    wanted: int
    tokens: int
    entropy: float
    confidence: float
    load_balance_loss: float
    router_z_loss: float
    slots: float = 0.0
    surplus: int | None = None
    other_ranks: int | None = None
    other_nodes: int | None = None
    bytes_sent: int | None = None
    expert_bias: list[float] | None = None


@dataclass(frozen=True)
class RoutingCounts:
    """The counts of each mixture of experts, by its layer's index in the model, the same on every rank.

    rows_between_ranks: [blocks][blocks], the rows that dispatch sent between blocks of ranks in a row, at most 32;
    those that stayed are on the diagonal.
    """

    layers: Mapping[int, LayerCounts]
    rows_between_ranks: list[list[int]]


@dataclass(frozen=True)
class Choices:
    """What one layer's router decided about own tokens in one pass.

    layer: its index in the model. token_id: [tokens] int64, -1 = padding. expert: [tokens, choices] int64, -1 = none.
    weight: [tokens, choices] float32. probs: [tokens, experts] float32, the router's probabilities. scores: [tokens,
    experts], whose order decides; None where tokens do not choose.
    """

    layer: int
    token_id: Tensor
    expert: Tensor
    weight: Tensor
    probs: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True)
class Features:
    """Own tokens after one half of a block. token_id: [tokens] int64, -1 = padding. x: [tokens, d_model]"""

    layer: int
    after: Literal["mixer", "channel_mixer"]
    token_id: Tensor
    x: Tensor


class Engine(Protocol):
    """Holds the model and its optimizer on this rank."""

    @property
    def step_count(self) -> int:
        """How many steps were done."""

    @property
    def learning_rate(self) -> float:
        """The rate of the step to come."""

    def parameters(self) -> Mapping[str, Tensor]:
        """Show what learns, by its name in the whole model: this rank's part, a DTensor where several share it.

        `grad` holds the gradient between forward_backward and step.
        """

    def routing(self) -> RoutingCounts:
        """Add up over all ranks what the routers did in the last step, which was watched; all ranks must call."""

    def record(
        self, *, training: bool, choices: Callable[[Choices], None] | None = None,
        features: Callable[[Features], None] | None = None,
        gradients: Callable[[Features], None] | None = None,
    ) -> AbstractContextManager[None]:
        """Show each pass of each layer on this rank while the context lasts, except what recompute runs again.

        training: passes that have a backward; otherwise those of evaluation. features: between the halves of a block,
        where they follow each other. gradients: with respect to these features, in training.
        """

    def where(self, error: BaseException) -> str:
        """Say in which part of the model an error arose, and the sizes of what was to travel."""

    def forward_backward(self, batches: Sequence[Batch], *, watch: bool = True) -> StepLosses:
        """Add up the gradients of this rank's micro-batches of one step, the global batch's on return.

        watch: whether `routing` will be asked for; otherwise the load alone is counted, which costs less.
        """

    def clear_gradients(self) -> None:
        """Forget the gradients of a step that is run again."""

    def step(self, guard: Tensor | None = None) -> Tensor:
        """Clip, update every weight, clear the gradients; return the gradient norm before clipping, scalar.

        guard: a figure of this step, scalar. Where it or the norm is no finite number on any rank, the update is left
        out on all, and the step counts all the same. All ranks must give one, or none.
        """

    def spoilt(self) -> list[str]:
        """Name the weights whose gradients here were no finite numbers, in the first such step since the last call."""

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Return the cross entropy in nats per target, over all ranks' batches."""

    def capture(
        self, files: Mapping[str, str | bytes], state: Mapping[str, Any], host: HostCopy | None = None
    ) -> Capture:
        """Collect what a checkpoint of this moment holds. files, state: small texts and values that belong to it.

        host: where tensors are copied to, so that they hold while training goes on; without it they change with the
        next step.
        """

    def load(self, checkpoint: Path, peak: Peak | None = None) -> None:
        """Go on from a checkpoint, whatever layout wrote it. peak: where the learning rate falls from."""


@dataclass(frozen=True)
class EngineKind:
    """A way to run steps. make: builds it, its class imported only now.

    check: refuses what it cannot do with a settled configuration, and packages that are missing. Raises ConfigError.
    """

    make: Callable[[Config, Mesh], Engine]
    check: Callable[[Config], None] = lambda config: None


def import_native() -> None:
    """Import what most runs need, before one names it."""
    import moescale.engine.native  # noqa: F401


def _native(config: Config, mesh: Mesh) -> Engine:
    from moescale.engine.native import NativeEngine

    return NativeEngine(config, mesh)


def _deepspeed(config: Config, mesh: Mesh) -> Engine:
    from moescale.engine.deepspeed import ZeroEngine

    return ZeroEngine(config, mesh)


def _check_deepspeed(config: Config) -> None:
    from moescale.engine.deepspeed_settings import check

    check(config)


def _megatron(config: Config, mesh: Mesh) -> Engine:
    from moescale.engine.megatron import MegatronEngine

    return MegatronEngine(config, mesh)


def _check_megatron(config: Config) -> None:
    from moescale.engine.megatron_settings import check

    check(config)


ENGINES: dict[str, EngineKind] = {
    "native": EngineKind(_native),
    "deepspeed": EngineKind(_deepspeed, _check_deepspeed),
    "megatron": EngineKind(_megatron, _check_megatron),
}


def check_engine(config: Config) -> None:
    """Refuse what the engine of a run cannot do, or what it lacks. config: settled. Raises ConfigError."""
    ENGINES[config.run.engine].check(config)


def build_engine(config: Config, mesh: Mesh) -> Engine:
    """Make the engine that the run names, with first weights. config: settled by `Config.for_world`."""
    check_engine(config)
    return ENGINES[config.run.engine].make(config, mesh)
