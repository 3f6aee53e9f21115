"""The learning rate as a pure function of the step.

It rises linearly over `optim.warmup_steps` to `optim.lr`, and then falls to `optim.final_lr_share` of that at step
`run.steps`; `inverse_sqrt` alone knows no last step. Where it falls from is a value of its own, the `Peak`, which
checkpoints keep: a run that goes on with other `run.steps` or another schedule falls from where its rate stands, so
that the rate never jumps. Another `optim.lr` scales every rate to come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moescale.config import OptimConfig


@dataclass(frozen=True)
class Peak:
    """Where the fall of the learning rate begins. step: counted from 0. share: the rate there over `optim.lr`."""

    step: int
    share: float


def first_peak(config: OptimConfig) -> Peak:
    """Return where a run that was never changed falls from: the full rate, after the warm-up."""
    return Peak(config.warmup_steps, 1.0)


def learning_rate(step: int, steps: int, config: OptimConfig, peak: Peak | None = None) -> float:
    """Compute the rate of one step.

    step: from 0, of `steps`. peak: where the fall begins; None is after the warm-up.
    """
    return config.lr * _share(step, steps, config, peak or first_peak(config))


def peak_after_change(
    step: int, old_steps: int, old: OptimConfig, old_peak: Peak, steps: int, config: OptimConfig
) -> Peak:
    """Return where the fall begins for a run that goes on at this step with these settings instead of the old ones.

    The same settings keep the peak. With others the rate falls from where it stands; within the warm-up it goes on
    rising to the full rate. Another `optim.lr` alone is no other shape.
    """
    if _shape(steps, config) == _shape(old_steps, old):
        return old_peak
    return first_peak(config) if step < config.warmup_steps else Peak(step, _share(step, old_steps, old, old_peak))


def _shape(steps: int, config: OptimConfig) -> tuple[object, ...]:
    """Gather what the curve depends on, all but its height."""
    if config.schedule == "inverse_sqrt":
        return config.warmup_steps, config.schedule, config.stable_steps
    return config.warmup_steps, config.schedule, steps, config.final_lr_share, config.decay_steps


def _share(step: int, steps: int, config: OptimConfig, peak: Peak) -> float:
    if step < peak.step:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return peak.share
    if config.schedule == "inverse_sqrt":
        last_full = max(peak.step + 1, config.stable_steps)
        return peak.share * math.sqrt(last_full / max(step + 1, last_full))
    begin = max(peak.step, steps - config.decay_steps) if config.schedule == "wsd" else peak.step
    done = min(1.0, max(0, step - begin) / max(1, steps - 1 - begin))
    fall = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    lowest = min(config.final_lr_share, peak.share)
    return lowest + (peak.share - lowest) * fall
