"""Optimizers by name: what each keeps beside a weight, and how it is made.

Checkpoints, conversions and proofs read this table and know no optimizer by name. It is read without torch, which only
`make` imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moescale.config import OptimConfig
from moescale.spec.weights import Init, Weight

if TYPE_CHECKING:
    import torch

Moments = Callable[[Weight], tuple[Weight, ...]]
Groups = list[dict[str, Any]]
"""Parameters in `params`, and the `weight_decay` that they share."""


@dataclass(frozen=True)
class Optimizer:
    """What others may know of an optimizer.

    moments: describes the tensors that are kept beside a weight, whole or of one expert. The name of each is a word of
    its own before the weight's, and its dims are some of the weight's; a checkpoint holds it as `optim.MOMENT.WEIGHT`.
    make: builds it, its moments zeros in `state` under their words, so that a checkpoint can be read into them.
    proof: keys of `optim` with which a first step multiplies no rounding error by more than one, and yet moves weights
    far beyond the tolerance of `moescale verify`.
    """

    moments: Moments
    make: Callable[[Groups, OptimConfig], torch.optim.Optimizer]
    proof: Mapping[str, float]


def shaped_as_weight(*words: str) -> Moments:
    """Describe moments that have an element for each element of the weight."""
    zeros = Init("zeros")
    return lambda weight: tuple(
        replace(weight, name=(word, *weight.name), init=zeros, decays=False, learns=False) for word in words)


def _adamw(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    from moescale.optim.adamw import LocalAdamW

    return LocalAdamW(groups, config)


OPTIMIZERS = {
    # The first step is lr x gradient / (|gradient| + eps). With a small eps it is lr x sign(gradient), and where a
    # gradient is zero, or nearly, the sign of the rounding error. With lr = eps it multiplies no error by more than
    # one, and yet moves weights a thousand times further than the tolerance.
    "adamw": Optimizer(shaped_as_weight("exp_avg", "exp_avg_sq"), _adamw, {"lr": 1e-2, "eps": 1e-2}),
}
