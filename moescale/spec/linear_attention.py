"""Linear attention: its keys, and the weights of one layer."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from moescale.spec.mixer import MixerConfig
from moescale.spec.small import Small, smallest_divisor
from moescale.spec.weights import Weight, matrix


class LinearAttentionConfig(MixerConfig):
    num_heads: int = Field(8, ge=1)
    """Heads of linear attention, each with queries, keys and values of its own."""
    head_dim: int = Field(32, ge=1)
    """Features of one head; its state is a matrix of as many rows and one more column."""

    def weights(self, d_model: int, init: str) -> tuple[Weight, ...]:
        """Describe the matrices of queries, keys, values and outputs."""
        features = self.num_heads * self.head_dim
        return (
            *(matrix(name, (features, d_model), ("heads", "d_model"), "heads", init, unit=self.head_dim)
              for name in ("q", "k", "v")),
            matrix("o", (d_model, features), ("d_model", "heads"), "heads", init, unit=self.head_dim),
        )

    def flops_per_token(self, d_model: int, context: int) -> int:
        """Count the matrices, and for each element of the state what a token adds to it and reads from it."""
        products = 2 * sum(weight.size for weight in self.weights(d_model, "normal"))
        return products + 4 * self._state_size

    def state_bytes(self, d_model: int, batch: int, length: int, itemsize: int) -> int:
        """Count the sums of generation, which are float32 whatever a model computes in, except in float64."""
        return batch * self._state_size * max(itemsize, 4)

    @property
    def _state_size(self) -> int:
        return self.num_heads * self.head_dim * (self.head_dim + 1)

    def shares(self, d_model: int) -> dict[str, int]:
        return {"linear_attention.num_heads": self.num_heads}

    def summary(self) -> str:
        return f"{self.num_heads} heads of linear attention"

    def shrink(self, small: Small) -> Self:
        """Make sizes small: as few heads, but more than one, as all degrees of `tp` share."""
        heads = smallest_divisor(
            self.num_heads, min(2, self.num_heads), lambda heads: all(heads % tp == 0 for tp in small.tps))
        return self.model_copy(update={"head_dim": 8, "num_heads": heads})
