"""S4 and S4D: the keys of linear state-space mixers that learn their systems, and the weights of one layer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator

from moescale.errors import refuse
from moescale.spec.mixer import MixerConfig
from moescale.spec.small import Small
from moescale.spec.weights import Init, Weight, below, matrix

MAX_RATE = 1e-3  # of A, B and steps, as S4's authors train them
C = Init("normal", 0.5**0.5)  # real and imaginary parts of complex numbers of deviation 1


class S4Config(MixerConfig):
    form: Literal["dplr", "diagonal"] = "dplr"
    """Systems of S4, diagonal plus low rank, or of S4D, which leaves the low rank out."""
    initialization: Literal["legs", "lin", "inv", "real"] = "legs"
    """Where eigenvalues start: HiPPO-LegS, or S4D's others, with form diagonal."""
    discretization: Literal["bilinear", "zero_order_hold"] = "bilinear"
    """How steps are taken; zero_order_hold with form diagonal."""
    d_state: int = Field(64, ge=2, le=1024)
    """States of each channel: pairs of conjugates, so an even number."""
    step_min: float = Field(1e-3, gt=0)
    """Smallest first step of a channel: about one over the positions that it remembers."""
    step_max: float = Field(1e-1, gt=0)
    """Largest first step of a channel."""
    output: Literal["glu", "linear"] = "glu"
    """What mixes the channels after S4's activation: a gated or a plain projection."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self.d_state % 2 != 0, f"s4.d_state={self.d_state} must be even, for pairs: use {self.d_state + 1}")
        refuse(self.form == "dplr" and self.initialization != "legs",
               f"s4.initialization={self.initialization} has no low rank: use s4.form=diagonal, or legs")
        refuse(self.form == "dplr" and self.discretization != "bilinear",
               f"s4.discretization={self.discretization} is for diagonal systems: use s4.form=diagonal, or bilinear")
        refuse(self.step_min > self.step_max,
               f"s4.step_min={self.step_min} is above s4.step_max={self.step_max}: exchange them")
        return self

    def weights(self, d_model: int, init: str) -> tuple[Weight, ...]:
        """Describe the systems, which no rank cuts, and the projection."""
        outputs = 2 * d_model if self.output == "glu" else d_model
        return (
            *below("systems", self._systems(d_model)),
            matrix("out", (outputs, d_model), ("d_model", "channels"), "channels", init),
        )

    def _systems(self, channels: int) -> tuple[Weight, ...]:
        """Describe what is never rounded. Eigenvalues are -exp(log_decay) + i frequency; pairs hold complex numbers.

        What the systems are made of neither decays nor learns faster than MAX_RATE; C, which reads them, does.
        """
        pairs = self.d_state // 2

        def states(name: str, init: Init, *, parts: bool) -> Weight:
            last = ((2,), ("parts",)) if parts else ((), ())
            return Weight((name,), (channels, pairs, *last[0]), ("channels", "d_state", *last[1]), None, "shared", init,
                          decays=False, max_rate=MAX_RATE)

        low_rank = (states("p", Init("table", table="p"), parts=True),) if self.form == "dplr" else ()
        b = Init("table", table="b") if self.form == "dplr" else Init("table", table="one")
        return (
            states("log_decay", Init("table", table=f"{self.initialization}_log_decay"), parts=False),
            states("frequency", Init("table", table=f"{self.initialization}_frequency"), parts=False),
            *low_rank, states("b", b, parts=True), replace(states("c", C, parts=True), decays=True, max_rate=math.inf),
            Weight(("d",), (channels,), ("channels",), None, "shared", Init("normal", 1.0), decays=False),
            replace(log_step(channels, self.step_min, self.step_max), max_rate=MAX_RATE),
        )

    def flops_per_token(self, d_model: int, context: int) -> int:
        """Count the forward pass of one token: its matrix, and its share of the transforms of a sequence."""
        projection = 2 * d_model * d_model * (2 if self.output == "glu" else 1)
        return projection + transforms(d_model, context)

    def state_bytes(self, d_model: int, batch: int, length: int, itemsize: int) -> int:
        """Count the states, at least float32."""
        return batch * d_model * self.d_state * max(itemsize, 4)

    def shares(self, d_model: int) -> dict[str, int]:
        return {"model.d_model": d_model}

    def summary(self) -> str:
        return f"{self.d_state} states a channel, {self.form}"

    def shrink(self, small: Small) -> Self:
        return self.model_copy(update={"d_state": min(self.d_state, 4)})


def log_step(channels: int, least: float, most: float) -> Weight:
    """Describe the logarithm of each channel's step, uniform at first between those of two steps."""
    init = Init("uniform", low=math.log(least), high=math.log(most))
    return Weight(("log_step",), (channels,), ("channels",), None, "shared", init, decays=False)


def transforms(channels: int, context: int) -> int:
    """Count a position's share of a transform to frequencies, their product and the transform back, of all channels."""
    return channels * (10 * (2 * context).bit_length() + 12)
