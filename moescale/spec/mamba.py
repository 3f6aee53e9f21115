"""Mamba: the keys of a selective state-space mixer, and the weights of one layer (Gu & Dao, 2023)."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field

from moescale.spec.mixer import MixerConfig
from moescale.spec.small import Small
from moescale.spec.weights import Init, Weight, below, by_depth, matrix, norm

STEPS = Init("uniform", low=math.log(1e-3), high=math.log(1e-1), of="log_softplus")


class MambaConfig(MixerConfig):
    d_state: int = Field(16, ge=1, le=1024)
    """States of each channel of Mamba."""
    d_conv: int = Field(4, ge=1, le=64)
    """Positions that Mamba's convolution sees, one's own included."""
    expand: int = Field(2, ge=1, le=64)
    """Channels of Mamba, over model.d_model."""
    dt_rank: int | None = Field(None, ge=1)
    """Features from which the steps of all Mamba's channels are made; null is model.d_model / 16, rounded up."""
    inner_norms: bool = False
    """Whether the features of steps, inputs and outputs are normalized, as in Jamba."""

    def d_inner(self, d_model: int) -> int:
        """Count the channels."""
        return self.expand * d_model

    def rank(self, d_model: int) -> int:
        """Count the features from which steps are made."""
        return self.dt_rank or -(-d_model // 16)

    def weights(self, d_model: int, init: str) -> tuple[Weight, ...]:
        """Describe the matrices of channels, gates and outputs, and the small weights, which no rank cuts.

        The outputs' start smaller, the more layers there are (mamba-ssm's `_init_weights`).
        """
        d_inner, rank, width = self.d_inner(d_model), self.rank(d_model), self.d_conv**-0.5
        selected = matrix("select", (rank + 2 * self.d_state, d_inner), ("selected", "d_inner"), None, init, "shared")
        return (
            matrix("x", (d_inner, d_model), ("d_inner", "d_model"), "d_inner", init),
            matrix("gate", (d_inner, d_model), ("d_inner", "d_model"), "d_inner", init),
            Weight(("conv", "weight"), (d_inner, self.d_conv), ("d_inner", "d_conv"), None, "shared",
                   Init("uniform", low=-width, high=width)),
            Weight(("conv", "bias"), (d_inner,), ("d_inner",), None, "shared", Init("uniform", low=-width, high=width),
                   decays=False),
            selected,
            *(self._inner_norms(rank) if self.inner_norms else ()),
            *below("scan", self._of_scan(d_inner, rank)),
            by_depth(matrix("out", (d_model, d_inner), ("d_model", "d_inner"), "d_inner", init)),
        )

    def _inner_norms(self, rank: int) -> tuple[Weight, ...]:
        return norm("step_norm", rank), norm("b_norm", self.d_state), norm("c_norm", self.d_state)

    def _of_scan(self, d_inner: int, rank: int) -> tuple[Weight, ...]:
        """Describe what is never rounded. a_log: of A = -exp(a_log), -1 to -d_state in each channel (S4D-Real)."""
        bound = rank**-0.5
        return (
            Weight(("step", ), (d_inner, rank), ("d_inner", "dt_rank"), None, "shared",
                   Init("uniform", low=-bound, high=bound)),
            Weight(("step_bias",), (d_inner,), ("d_inner",), None, "shared", STEPS, decays=False),
            Weight(("a_log",), (d_inner, self.d_state), ("d_inner", "d_state"), None, "shared",
                   Init("table", table="real_log_decay"), decays=False),
            Weight(("d",), (d_inner,), ("d_inner",), None, "shared", Init("ones"), decays=False),
        )

    def flops_per_token(self, d_model: int, context: int) -> int:
        """Count the forward pass of one token: its matrices, the convolution, and six for each state of the scan."""
        d_inner = self.d_inner(d_model)
        matrices = sum(weight.size for weight in self.weights(d_model, "normal")
                       if len(weight.shape) == 2 and weight.name[-1] != "a_log")
        return 2 * matrices + 6 * d_inner * self.d_state

    def state_bytes(self, d_model: int, batch: int, length: int, itemsize: int) -> int:
        """Count the states, at least float32, and the inputs that the convolution looks back on."""
        return batch * self.d_inner(d_model) * (self.d_state * max(itemsize, 4) + (self.d_conv - 1) * itemsize)

    def shares(self, d_model: int) -> dict[str, int]:
        return {"mamba.expand x model.d_model": self.d_inner(d_model)}

    def summary(self) -> str:
        return f"{self.d_state} states a channel"

    def shrink(self, small: Small) -> Self:
        """Make sizes small; d_model, which is a multiple of all degrees of tp, is for the model to say."""
        return self.model_copy(update={
            "d_state": min(self.d_state, 4), "dt_rank": None if self.dt_rank is None else min(self.dt_rank, 3)})
