"""HiPPO: the keys of a layer that remembers signals as coefficients, and its weights."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from moescale.errors import refuse
from moescale.spec.mixer import MixerConfig
from moescale.spec.small import Small, smallest_multiple
from moescale.spec.weights import Weight, matrix


class HippoConfig(MixerConfig):
    measure: Literal["legs", "legt", "lagt", "fourier"] = "legs"
    """What is remembered: all of the document alike, a window (polynomials or waves), or all with a decay (lagt)."""
    channels: int = Field(8, ge=1)
    """Signals that a layer remembers, each a projection of the features."""
    d_state: int = Field(64, ge=1)
    """Numbers in which each signal is remembered: degrees of polynomials, or waves."""
    theta: float | None = Field(None, gt=0)
    """Positions of the window of legt and fourier, or of the decay of lagt; null with legs, which has none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self.measure == "legs" and self.theta is not None,
               f"hippo.theta={self.theta} means nothing to hippo.measure=legs, which remembers all of a document: "
               "leave it out, or use hippo.measure=legt for a window")
        refuse(self.measure != "legs" and self.theta is None,
               f"hippo.measure={self.measure} needs hippo.theta, the positions that it remembers: write e.g. 256")
        refuse(self.measure == "fourier" and self.d_state % 2 == 0,
               f"hippo.d_state={self.d_state} must be odd for hippo.measure=fourier, which has a constant and pairs of "
               f"waves: use {self.d_state + 1}")
        return self

    def weights(self, d_model: int, init: str) -> tuple[Weight, ...]:
        """Describe the projections to the signals, and from what is remembered of them."""
        return (
            matrix("u", (self.channels, d_model), ("channels", "d_model"), "channels", init),
            matrix("o", (d_model, self.channels * self.d_state), ("d_model", "channels"), "channels", init,
                   unit=self.d_state),
        )

    def flops_per_token(self, d_model: int, context: int) -> int:
        """Count the forward pass of one token: its matrices, and a step of the recurrence."""
        products = 2 * sum(weight.size for weight in self.weights(d_model, "normal"))
        return products + 2 * self.channels * self.d_state * (self.d_state + 1)

    def state_bytes(self, d_model: int, batch: int, length: int, itemsize: int) -> int:
        """Count what is remembered, at least in float32."""
        return batch * self.channels * self.d_state * max(4, itemsize)

    def shares(self, d_model: int) -> dict[str, int]:
        return {"hippo.channels": self.channels}

    def shrink(self, small: Small) -> Self:
        theta = self.theta
        if theta is not None:
            theta = max(2.0, theta * small.small_seq_len / small.seq_len)
        return self.model_copy(update={
            "channels": smallest_multiple(2, small.tps), "d_state": 4 + self.d_state % 2, "theta": theta})

    def summary(self) -> str:
        return f"{self.channels} signals in {self.d_state} numbers ({self.measure})"

    def acts(self, key: str) -> bool:
        return key != "theta" or self.measure != "legs"
