"""Loss spikes: when a loss is one, when a step is not finite, and from where the run goes on.

PaLM's remedy (Chowdhery et al., 2023, section 5.1): go back to a checkpoint from before the spike, and leave out the
batches around it. What is known of the losses so far belongs to a checkpoint, so that a run that was cut off goes back
where it would have gone back anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from moescale.config import ConfigError, SpikesConfig
from moescale.data.batches import Batches, Position


@dataclass(frozen=True)
class Losses:
    """What the losses of a run were like so far.

    count: of losses. mean, variance: running ones, over about `spikes.window` losses. rollbacks: times that the run
    went back.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    rollbacks: int = 0

    def and_then(self, loss: float, window: int) -> Self:
        """Take one loss more."""
        share, away = 1 / min(self.count + 1, window), loss - self.mean
        variance = (1 - share) * (self.variance + share * away**2)
        return replace(self, count=self.count + 1, mean=self.mean + share * away, variance=variance)


def is_finite(figures: Iterable[float]) -> bool:
    """Say whether a step may be trusted. figures: its loss and the norm of its gradient, or a held-out loss"""
    return all(map(math.isfinite, figures))


class Spikes:
    """Reads every loss of a run, in order."""

    def __init__(self, config: SpikesConfig, state: Mapping[str, Any]) -> None:
        """state: as a checkpoint says it."""
        self.config, self.known = config, read_losses(state)

    @property
    def looks(self) -> bool:
        """Whether the run goes back at all."""
        return self.config.deviations is not None

    def find(self, losses: Sequence[float]) -> int | None:
        """Give the place of the first spike among the next losses, finite numbers, which are known from then on."""
        for place, loss in enumerate(losses):
            if self._is_spike(loss):
                return place
            self.known = self.known.and_then(loss, self.config.window)
        return None

    def take(self, losses: Sequence[float]) -> None:
        """Know these losses, spikes or not."""
        for loss in losses:
            self.known = self.known.and_then(loss, self.config.window)

    def gone_back(self, state: Mapping[str, Any]) -> None:
        """Know what was known at a checkpoint, but for how often the run went back. state: the checkpoint's"""
        self.known = replace(read_losses(state), rollbacks=self.known.rollbacks + 1)

    def _is_spike(self, loss: float) -> bool:
        assert self.config.deviations is not None
        known = self.known
        return known.count >= self.config.window and (
            loss > known.mean + self.config.deviations * math.sqrt(known.variance))


def read_losses(state: Mapping[str, Any]) -> Losses:
    """Read what a checkpoint knows of the losses before it; one of a run that did not look knows none."""
    match state.get("losses"):
        case None:
            return Losses()
        case [int(count), float(mean), float(variance), int(rollbacks)] if count >= 0 and variance >= 0:
            return Losses(count, mean, variance, rollbacks)
        case other:
            raise ConfigError(f"the checkpoint is damaged: it says losses={other!r}")


def around(batches: Batches, step: int, left: Batches, skip: int) -> Position:
    """Say where the data goes on after going back: beyond `skip` batches, and beyond all that were seen since.

    batches: as they came from the checkpoint on. left: as they came to the steps done when the spike was found, `step`.
    """
    start = batches.start
    beyond = max(batches.position(start.step + skip).sequences, left.position(step).sequences)
    return replace(start, sequences=beyond)
