"""LSSL: the keys of linear state-space mixers with HiPPO's dense matrix, and the weights of one layer."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from moescale.errors import refuse
from moescale.spec.mixer import MixerConfig
from moescale.spec.s4 import log_step, transforms
from moescale.spec.small import Small
from moescale.spec.weights import Init, Weight, below, matrix


class LsslConfig(MixerConfig):
    d_state: int = Field(64, ge=1, le=512)
    """States of each channel of LSSL."""
    outputs: int = Field(1, ge=1, le=64)
    """Outputs that are read from the states of each channel of LSSL."""
    alpha: float = Field(0.5, ge=0, le=1)
    """How steps are taken: 0 is forward Euler, 0.5 bilinear, 1 backward Euler."""
    step_min: float = Field(1e-3, gt=0)
    """Smallest first step of a channel of LSSL: about one over the positions that it remembers."""
    step_max: float = Field(1e-1, gt=0)
    """Largest first step of a channel of LSSL."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self.step_min > self.step_max,
               f"lssl.step_min={self.step_min} is above lssl.step_max={self.step_max}: exchange them")
        growth = self.step_max * self.d_state * (1 - 2 * self.alpha)
        refuse(growth > 2, f"lssl.alpha={self.alpha} with lssl.step_max={self.step_max} lets states grow: "
                           "use lssl.alpha=0.5")
        return self

    def weights(self, d_model: int, init: str) -> tuple[Weight, ...]:
        """Describe what reads the states, which no rank cuts, and the projection. A and B are HiPPO-LegS's."""
        return (
            *below("systems", (
                Weight(("c",), (d_model, self.outputs, self.d_state), ("channels", "outputs", "d_state"), None,
                       "shared", Init("normal", 1.0)),
                Weight(("d",), (d_model, self.outputs), ("channels", "outputs"), None, "shared", Init("normal", 1.0),
                       decays=False),
                log_step(d_model, self.step_min, self.step_max))),
            matrix("out", (d_model, d_model * self.outputs), ("d_model", "channels"), "channels", init,
                   unit=self.outputs),
        )

    def flops_per_token(self, d_model: int, context: int) -> int:
        """Count the forward pass of one token: its matrix, and its share of the transforms of a sequence."""
        return 2 * d_model * d_model * self.outputs + transforms(d_model * self.outputs, context)

    def state_bytes(self, d_model: int, batch: int, length: int, itemsize: int) -> int:
        """Count the states, at least float32."""
        return batch * d_model * self.d_state * max(itemsize, 4)

    def shares(self, d_model: int) -> dict[str, int]:
        return {"model.d_model": d_model}

    def summary(self) -> str:
        return f"{self.d_state} states a channel, {self.outputs} outputs"

    def shrink(self, small: Small) -> Self:
        return self.model_copy(update={"d_state": min(self.d_state, 4), "outputs": min(self.outputs, 2)})
