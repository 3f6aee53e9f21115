"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from moescale.config import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Warm up linearly, then fall to `final_lr_share` at the last step.

    step: from 0, of `steps`. -> the rate of that step
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    done = min(1.0, (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
    if config.schedule == "constant":
        return config.lr
    fall = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * fall)
