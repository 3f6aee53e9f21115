"""Optimizers by name: what each keeps beside a weight, and how it is made.

Checkpoints, conversions and proofs read this table and know no optimizer by name. It is read without torch, which only
`make` imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moescale.config import Config, OptimConfig
from moescale.spec.model import describe
from moescale.spec.weights import Init, Weight

if TYPE_CHECKING:
    import torch

Moments = Callable[[Weight, OptimConfig], tuple[Weight, ...]]
Groups = list[dict[str, Any]]
"""Pairs of name and parameter in `params`, and what they share: `weight_decay`, `max_rate`, whether their first dim is
of `experts`."""


@dataclass(frozen=True)
class Optimizer:
    """What others may know of an optimizer.

    moments: describes the tensors that a run with these keys keeps beside a weight, whole or of one expert. The name of
    each is a word of its own before the weight's, and its dims are some of the weight's; a checkpoint holds it as
    `optim.MOMENT.WEIGHT`.
    make: builds it, its moments zeros in `state` under their words, so that a checkpoint can be read into them.
    proof: keys of `optim` with which a first step multiplies no rounding error by more than one, and yet moves weights
    far beyond the tolerance of `moescale verify`.
    """

    moments: Moments
    make: Callable[[Groups, OptimConfig], torch.optim.Optimizer]
    proof: Mapping[str, float]


MOMENT_BYTES = {"float32": 4, "bfloat16": 2}


def shaped_as_weight(*words: str) -> Moments:
    """Describe moments that have an element for each element of the weight."""
    return lambda weight, config: tuple(_moment(weight, word) for word in words)


def _moment(weight: Weight, word: str, without: int | None = None) -> Weight:
    """Describe a moment of a weight. without: the place of a dim that it lacks"""
    kept = [place for place in range(len(weight.dims)) if place != without]
    dims = tuple(weight.dims[place] for place in kept)
    return replace(
        weight, name=(word, *weight.name), shape=tuple(weight.shape[place] for place in kept), dims=dims,
        cut=weight.cut if weight.cut in dims else None, init=Init("zeros"), decays=False, learns=False)


def _adamw(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    from moescale.optim.adamw import LocalAdamW, RoundedAdamW

    return (RoundedAdamW if config.moments == "bfloat16" else LocalAdamW)(groups, config)


def _adafactor_moments(weight: Weight, config: OptimConfig) -> tuple[Weight, ...]:
    """Describe running updates, if there are any, and second moments: of a matrix perhaps by rows and columns."""
    first = (_moment(weight, "exp_avg"),) if config.momentum > 0 else ()
    last = len(weight.dims) - 1
    stacked = weight.view == "sparse" and weight.dims[0] == "experts"
    if not config.factored or len(weight.dims) - int(stacked) < 2:
        return (*first, _moment(weight, "exp_avg_sq"))
    return (*first, _moment(weight, "exp_avg_sq_row", without=last),
            _moment(weight, "exp_avg_sq_col", without=last - 1))


def _adafactor(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    from moescale.optim.adafactor import Adafactor

    return Adafactor(groups, config)


OPTIMIZERS = {
    # The first step is lr x gradient / (|gradient| + eps). With a small eps it is lr x sign(gradient), and where a
    # gradient is zero, or nearly, the sign of the rounding error. With lr = eps it multiplies no error by more than
    # one, and yet moves weights a thousand times further than the tolerance.
    "adamw": Optimizer(shaped_as_weight("exp_avg", "exp_avg_sq"), _adamw, {"lr": 1e-2, "eps": 1e-2}),
    # The first step divides by means over rows and columns, in which rounding errors are small. Vectors, of which each
    # element is divided by its own size, are few.
    "adafactor": Optimizer(_adafactor_moments, _adafactor, {"lr": 1e-2}),
}


def bytes_of_moments(config: Config) -> int:
    """Count the bytes that the optimizer keeps beside the weights of the whole model."""
    moments = OPTIMIZERS[config.optim.name].moments
    return MOMENT_BYTES[config.optim.moments] * sum(
        moment.size for weight in describe(config).weights() if weight.learns
        for moment in moments(weight, config.optim))
