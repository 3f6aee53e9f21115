"""Mamba-2: the keys of a state-space mixer of heads, and the weights of one layer (Dao & Gu, 2024)."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from moescale.errors import divisors, refuse
from moescale.spec.mamba import STEPS
from moescale.spec.mixer import MixerConfig
from moescale.spec.small import Small, smallest_divisor
from moescale.spec.weights import Init, Weight, below, by_depth, matrix


class Mamba2Config(MixerConfig):
    d_state: int = Field(128, ge=1, le=1024)
    """States of each channel of Mamba-2."""
    d_conv: int = Field(4, ge=1, le=64)
    """Positions that Mamba-2's convolution sees, one's own included."""
    expand: int = Field(2, ge=1, le=64)
    """Channels of Mamba-2, over model.d_model."""
    head_dim: int = Field(64, ge=1)
    """Channels of Mamba-2 that share one decay."""
    num_groups: int = Field(1, ge=1)
    """Groups of Mamba-2's heads, each with inputs and outputs of states, and a norm, of its own."""

    def d_inner(self, d_model: int) -> int:
        """Count the channels."""
        return self.expand * d_model

    def num_heads(self, d_model: int) -> int:
        """Count the heads. Raises ConfigError."""
        channels = self.d_inner(d_model)
        refuse(channels % self.head_dim != 0, f"mamba2.head_dim={self.head_dim} must divide mamba2.expand x "
               f"model.d_model={channels}: use {divisors(channels)}")
        heads = channels // self.head_dim
        refuse(heads % self.num_groups != 0, f"mamba2.num_groups={self.num_groups} must divide the {heads} heads of "
               f"mamba2.expand x model.d_model={channels} by mamba2.head_dim={self.head_dim}: use {divisors(heads)}")
        return heads

    def weights(self, d_model: int, init: str) -> tuple[Weight, ...]:
        """Describe the matrices of channels, gates and outputs, and the small weights, which no rank cuts.

        The outputs' start smaller, the more layers there are (mamba-ssm's `_init_weights`).
        """
        channels, heads, states = self.d_inner(d_model), self.num_heads(d_model), 2 * self.num_groups * self.d_state
        return (
            matrix("x", (channels, d_model), ("d_inner", "d_model"), "d_inner", init, unit=self.head_dim),
            matrix("gate", (channels, d_model), ("d_inner", "d_model"), "d_inner", init, unit=self.head_dim),
            matrix("select", (states, d_model), ("selected", "d_model"), None, init, "shared"),
            matrix("step", (heads, d_model), ("heads", "d_model"), None, init, "shared"),
            *below("conv", self._of_convolution(channels, "d_inner")),
            *below("select_conv", self._of_convolution(states, "selected")),
            *below("scan", (
                Weight(("step_bias",), (heads,), ("heads",), None, "shared", STEPS, decays=False),
                Weight(("a_log",), (heads,), ("heads",), None, "shared", Init("uniform", low=1, high=16, of="exp"),
                       decays=False),
                Weight(("d",), (heads,), ("heads",), None, "shared", Init("ones"), decays=False))),
            Weight(("norm", "weight"), (channels,), ("d_inner",), None, "shared", Init("ones"), decays=False),
            by_depth(matrix("out", (d_model, channels), ("d_model", "d_inner"), "d_inner", init, unit=self.head_dim)),
        )

    def _of_convolution(self, channels: int, word: str) -> tuple[Weight, ...]:
        width = self.d_conv**-0.5
        init = Init("uniform", low=-width, high=width)
        return (Weight(("weight",), (channels, self.d_conv), (word, "d_conv"), None, "shared", init),
                Weight(("bias",), (channels,), (word,), None, "shared", init, decays=False))

    def flops_per_token(self, d_model: int, context: int) -> int:
        """Count the forward pass of one token: its matrices, the convolutions, and six for each state."""
        matrices = sum(weight.size for weight in self.weights(d_model, "normal") if len(weight.shape) == 2)
        return 2 * matrices + 6 * self.d_inner(d_model) * self.d_state

    def state_bytes(self, d_model: int, batch: int, length: int, itemsize: int) -> int:
        """Count the states, at least float32, and the inputs that the convolutions look back on."""
        channels = self.d_inner(d_model)
        inputs = (channels + 2 * self.num_groups * self.d_state) * (self.d_conv - 1)
        return batch * (channels * self.d_state * max(itemsize, 4) + inputs * itemsize)

    def shares(self, d_model: int) -> dict[str, int]:
        return {"mamba2.expand x model.d_model / mamba2.head_dim": self.num_heads(d_model)}

    def refuse(self, d_model: int, tp: int, cp: int) -> None:
        self.num_heads(d_model)
        refuse(self.num_groups % tp != 0 and tp % self.num_groups != 0,
               f"parallel.tp={tp} must divide mamba2.num_groups={self.num_groups} or be a multiple of it: "
               f"use {divisors(self.num_groups)}")

    def summary(self) -> str:
        return f"{self.num_groups} groups of {self.d_state} states a channel"

    def shrink(self, small: Small) -> Self:
        """Make sizes small: groups that tp cuts stay cut."""
        groups = smallest_divisor(self.num_groups, min(2, self.num_groups), lambda groups: all(
            (groups % tp == 0) == (self.num_groups % tp == 0) for tp in small.tps))
        return self.model_copy(update={"d_state": min(self.d_state, 4), "head_dim": 4, "num_groups": groups})
