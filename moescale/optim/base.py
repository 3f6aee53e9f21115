"""Optimizers by name: what each keeps beside a weight, and how it is made.

Checkpoints, conversions and proofs read this table and know no optimizer by name. It is read without torch, which only
`make` imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moescale.config import OptimConfig

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Groups = list[dict[str, Any]]
"""Parameters in `params`, and the `weight_decay` that they share."""


@dataclass(frozen=True)
class Optimizer:
    """What others may know of an optimizer.

    moments: gives the tensors that are kept beside a weight of this shape, by name, with theirs; names have no dots. A
    checkpoint holds each as `optim.MOMENT.WEIGHT`.
    make: builds it, its moments zeros in `state` under these names, so that a checkpoint can be read into them.
    proof: keys of `optim` with which a first step multiplies no rounding error by more than one, and yet moves weights
    far beyond the tolerance of `moescale verify`.
    """

    moments: Callable[[Shape], dict[str, Shape]]
    make: Callable[[Groups, OptimConfig], torch.optim.Optimizer]
    proof: Mapping[str, float]


def shaped_as_weight(*names: str) -> Callable[[Shape], dict[str, Shape]]:
    """Describe moments that have an element for each element of the weight."""
    return lambda shape: dict.fromkeys(names, shape)


def _adamw(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    from moescale.optim.adamw import LocalAdamW

    return LocalAdamW(groups, config)


OPTIMIZERS = {
    # The first step is lr x gradient / (|gradient| + eps). With a small eps it is lr x sign(gradient), and where a
    # gradient is zero, or nearly, the sign of the rounding error. With lr = eps it multiplies no error by more than
    # one, and yet moves weights a thousand times further than the tolerance.
    "adamw": Optimizer(shaped_as_weight("exp_avg", "exp_avg_sq"), _adamw, {"lr": 1e-2, "eps": 1e-2}),
}
