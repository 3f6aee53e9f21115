"""Attention: its keys, and the weights of one layer."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from moescale.errors import any_of, divisors, refuse
from moescale.spec.mixer import MixerConfig
from moescale.spec.small import Small, smallest_divisor
from moescale.spec.weights import Weight, matrix


class AttentionConfig(MixerConfig):
    num_heads: int = Field(8, ge=1)
    """Query heads of attention."""
    num_kv_heads: int = Field(2, ge=1)
    """Key and value heads of attention, each shared by as many query heads."""
    head_dim: int = Field(32, ge=2)
    """Features of one head."""
    window: int | None = Field(None)
    """Positions that a query sees, itself included; null is all before it."""
    positions: Literal["rope", "alibi", "none"] = "rope"
    """How attention knows the order: rotated queries and keys, biases by distance, or not at all."""
    rope_theta: float = Field(10000.0, gt=1)
    """Base of the wavelengths of rope: larger for longer contexts."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self.num_heads % self.num_kv_heads != 0,
               f"attention.num_kv_heads={self.num_kv_heads} must divide attention.num_heads={self.num_heads}: "
               f"use {divisors(self.num_heads)}")
        refuse(self.window is not None and self.window < 1,
               f"attention.window={self.window} must be at least 1 (a query sees itself): "
               "write null for attention to all positions before it")
        refuse(self.positions == "rope" and self.head_dim % 2 != 0,
               f"attention.head_dim={self.head_dim} must be even for rope: use {self.head_dim + 1}")
        return self

    def weights(self, d_model: int, init: str) -> tuple[Weight, ...]:
        """Describe the matrices of queries, keys, values and outputs."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            matrix("q", (q, d_model), ("heads", "d_model"), "heads", init, unit=self.head_dim),
            matrix("k", (kv, d_model), ("kv_heads", "d_model"), "kv_heads", init, unit=self.head_dim),
            matrix("v", (kv, d_model), ("kv_heads", "d_model"), "kv_heads", init, unit=self.head_dim),
            matrix("o", (d_model, q), ("d_model", "heads"), "heads", init, unit=self.head_dim),
        )

    def flops_per_token(self, d_model: int, context: int) -> int:
        """Count the forward pass of one token: its matrices, and the scores and sums over the positions it sees."""
        seen = min(self.window or context, context)
        products = 2 * sum(weight.size for weight in self.weights(d_model, "normal"))
        return products + 4 * self.num_heads * self.head_dim * seen

    def state_bytes(self, d_model: int, batch: int, length: int, itemsize: int) -> int:
        """Count the keys and values that generation keeps of the positions that a query may see."""
        kept = min(self.window or length, length)
        return 2 * batch * kept * self.num_kv_heads * self.head_dim * itemsize

    def shares(self, d_model: int) -> dict[str, int]:
        return {"attention.num_heads": self.num_heads}

    def refuse(self, d_model: int, tp: int, cp: int) -> None:
        heads = self.num_kv_heads
        refuse(heads % tp != 0 and tp % heads != 0,
               f"parallel.tp={tp} must divide attention.num_kv_heads={heads} or be a multiple of it: "
               f"use {any_of([n for n in range(1, tp + 1) if heads % n == 0])}")

    def acts(self, key: str) -> bool:
        return super().acts(key) and (key != "rope_theta" or self.positions == "rope")

    @property
    def seen(self) -> int | None:
        return self.window

    @property
    def score_features(self) -> int:
        return self.num_heads * self.head_dim

    def holds_beyond(self, seq_len: int) -> bool:
        """Linear biases do, and windows that training has filled."""
        return self.positions == "alibi" or (self.window or seq_len + 1) <= seq_len

    def summary(self) -> str:
        return f"{self.num_heads} heads on {self.num_kv_heads} key heads"

    def shrink(self, small: Small) -> Self:
        """Make sizes small: key heads that are cut stay cut, and a window stays shorter than a sequence."""
        group, kv_heads = self.num_heads // self.num_kv_heads, self.num_kv_heads
        num_kv_heads = smallest_divisor(kv_heads, min(2, kv_heads), lambda heads: all(
            _path(heads, tp) == _path(kv_heads, tp) and heads * group % tp == 0 for tp in small.tps))
        group = smallest_divisor(
            group, min(2, group), lambda each: all(num_kv_heads * each % tp == 0 for tp in small.tps))
        window = self.window
        if window is not None:
            scaled = round(small.small_seq_len * window / small.seq_len)
            window = min(max(scaled, 3), small.small_seq_len - 1) if window < small.seq_len else small.small_seq_len
        return self.model_copy(update={
            "head_dim": 8, "num_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads, "window": window})


def _path(kv_heads: int, tp: int) -> str:
    """Name what tensor parallelism does with key heads."""
    if kv_heads % tp == 0:
        return "cut"
    return "shared" if tp % kv_heads == 0 else "neither"
