"""What a weight is: its name, its shape, how it is cut over ranks, how it starts. No tensor is needed to say it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

View = Literal["dense", "shared", "sparse"]


@dataclass(frozen=True)
class Init:
    """The first values of a weight: constants, or draws.

    normal: of deviation `std`; a truncated one is cut at two of them. uniform: the weight is, from `low` to `high`, or
    a function `of` it: its exponential, or the logarithm of its softplus. table: each channel has those of one of the
    tables of linear systems (`ops.s4.first_values`). by_depth: the values are divided by the square root of the number
    of layers, so that what all layers add to the residual stream does not grow with it.
    """

    kind: Literal["zeros", "ones", "normal", "truncated_normal", "uniform", "table"]
    std: float = 0.0
    low: float = 0.0
    high: float = 0.0
    of: Literal["weight", "exp", "log_softplus"] = "weight"
    table: str = ""
    by_depth: bool = False


@dataclass(frozen=True)
class Weight:
    """One tensor of a model, or of a part of it, whole as on one process.

    name: the path of modules to it and its own name; joined with dots where files and torch need a text.
    dims: a word for each dim of the shape. cut: the dim over which ranks may share the weight, by tensor parallelism,
    or by expert-tensor parallelism where it belongs to experts; None where each has all of it. view: which ranks meet
    other tokens with it, and so add up its gradient: those of the mesh's dense, shared or sparse view. What is shared
    stays whole in a run; only files of other programs cut it. unit: elements of the cut dim that stay together, as
    those of a head do. decays: whether weight decay pulls at it. max_rate: the highest learning rate that moves it,
    whatever the schedule says. learns: whether it has a gradient; a buffer, such as an expert's bias, has none.
    """

    name: tuple[str, ...]
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    cut: str | None
    view: View
    init: Init
    decays: bool = True
    max_rate: float = math.inf
    learns: bool = True
    unit: int = 1

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def cut_dim(self) -> int:
        """The place of `cut` among the dims."""
        assert self.cut is not None
        return self.dims.index(self.cut)

    def divides_among(self, ranks: int) -> bool:
        """Say whether so many ranks can each have an equal part of the cut dim."""
        return self.cut is not None and self.shape[self.cut_dim] // self.unit % ranks == 0


def below(name: str, weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """Name the weights of a part from one module above it."""
    return tuple(replace(weight, name=(name, *weight.name)) for weight in weights)


def initial(init: str, fan_in: int) -> Init:
    """Say how a matrix of `fan_in` input features starts under `model.init`."""
    if init == "normal":
        return Init("normal", 0.02)
    if init == "fan_in":
        return Init("normal", fan_in**-0.5)  # PaLM, sec. 2
    return Init("truncated_normal", math.sqrt(0.1 / fan_in))  # a tenth of the usual variance (Switch, table 3)


def matrix(
    name: str, shape: tuple[int, int], dims: tuple[str, str], cut: str | None, init: str, view: View = "dense",
    unit: int = 1,
) -> Weight:
    """Describe the matrix of a linear layer. shape: outputs, inputs."""
    return Weight((name, "weight"), shape, dims, cut, view, initial(init, shape[1]), unit=unit)


def by_depth(weight: Weight) -> Weight:
    """Let the first values be divided by the square root of the number of layers."""
    return replace(weight, init=replace(weight.init, by_depth=True))


def norm(name: str, d_model: int) -> Weight:
    """Describe the scale of a norm."""
    return Weight((name, "weight"), (d_model,), ("d_model",), None, "shared", Init("ones"), decays=False)
