"""Dense feed-forwards: their keys, and the weights of one."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from moescale.errors import check_width
from moescale.spec.group import Group
from moescale.spec.small import Small, smallest_multiple
from moescale.spec.weights import View, Weight, matrix

Activation = Literal["swiglu", "geglu", "gelu", "relu"]
GATED = frozenset({"swiglu", "geglu"})  # these multiply the activation with a second projection (GLU Variants, 2020)


class FeedForwardConfig(Group):
    d_ff: int = Field(1024, ge=8)
    """Hidden features of a dense feed-forward."""
    activation: Activation = "swiglu"
    """The nonlinearity of a dense feed-forward; swiglu and geglu have a gate."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_width("feed_forward.d_ff", self.d_ff)
        return self

    def weights(self, d_model: int, init: str) -> tuple[Weight, ...]:
        """Describe the matrices into the hidden features and back."""
        return feed_forward_weights(d_model, self.d_ff, self.activation, init)

    def flops_per_token(self, d_model: int, context: int) -> int:
        """Count the forward pass of one token: two for each element of a matrix."""
        return 2 * sum(weight.size for weight in self.weights(d_model, "normal"))

    def state_bytes(self, d_model: int, batch: int, length: int, itemsize: int) -> int:
        """Count what generation keeps: nothing, since no token asks for another."""
        return 0

    def shrink(self, small: Small) -> Self:
        """Make sizes small."""
        return self.model_copy(update={"d_ff": smallest_multiple(32, (8, *small.tps))})


def feed_forward_weights(
    d_model: int, d_ff: int, activation: str, init: str, view: View = "dense"
) -> tuple[Weight, ...]:
    """Describe a feed-forward; experts have the same matrices, one by one or, where all tokens use them, as one."""
    names = ("gate", "up") if activation in GATED else ("up",)
    inner = [matrix(name, (d_ff, d_model), ("d_ff", "d_model"), "d_ff", init, view) for name in names]
    return (*inner, matrix("down", (d_model, d_ff), ("d_model", "d_ff"), "d_ff", init, view))
