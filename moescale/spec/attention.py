"""Attention: its keys, and the weights of one layer."""

from __future__ import annotations

from typing import Any, Literal, Self

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
    dilation: int = Field(1, ge=1)
    """Distance between the positions that a query sees: of every so many one."""
    block_size: int | None = Field(None, ge=1)
    """Positions of a block: a document is cut into blocks, and a query sees its own alone; null is no blocks."""
    stride: int | None = Field(None, ge=1)
    """In the second half of the heads, a query sees every so manieth position before it, whatever the window is."""
    global_tokens: int = Field(0, ge=0)
    """First positions of a document that all of its queries see beside their window or block."""
    memory: int = Field(0, ge=0)
    """Positions before its block that a query sees too, and through which no gradient flows (Transformer-XL)."""
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
        hides = self.window is not None or self.block_size is not None
        refuse(self.global_tokens > 0 and (self.dilation > 1 or self.stride is not None),
               f"attention.global_tokens={self.global_tokens} goes with a window or a block: write "
               "attention.dilation=1 and attention.stride=null, or attention.global_tokens=0")
        refuse(self.global_tokens > 0 and not hides,
               f"attention.global_tokens={self.global_tokens} changes nothing where queries see all before them: write "
               "attention.window or attention.block_size, or attention.global_tokens=0")
        refuse(self.memory > 0 and self.block_size is None,
               f"attention.memory={self.memory} is what lies before a block: write attention.block_size, or, for all "
               "that lies so far behind, attention.window instead")
        refuse(self.memory > 0 and (self.window is not None or self.dilation > 1 or self.stride is not None
                                    or self.global_tokens > 0),
               f"attention.memory={self.memory} goes with blocks alone: write attention.window=null, "
               "attention.dilation=1, attention.stride=null and attention.global_tokens=0, or attention.memory=0")
        refuse(self.stride is not None and not hides,
               f"attention.stride={self.stride} leaves the first half of the heads to a window or a block: write e.g. "
               f"attention.window={self.stride}, or, for all heads, attention.dilation={self.stride} instead")
        refuse(self.stride is not None and self.num_heads % 2 != 0,
               f"attention.num_heads={self.num_heads} must be even for attention.stride: use {self.num_heads + 1}")
        refuse(self.stride is not None and self.num_kv_heads % 2 != 0 and self.num_kv_heads > 1,
               f"attention.num_kv_heads={self.num_kv_heads} must be 1 or even for attention.stride: use 1")
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
        products = 2 * sum(weight.size for weight in self.weights(d_model, "normal"))
        features = self.num_heads * self.head_dim // len(self.visibilities)
        return products + sum(4 * features * _keys(context, **seen) for seen in self.visibilities)

    def state_bytes(self, d_model: int, batch: int, length: int, itemsize: int) -> int:
        """Count the keys and values that generation keeps of the positions that a query may see."""
        kept = min(self._reach or length, length)
        kept += self.global_tokens if kept == self._reach else 0
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
    def visibilities(self) -> tuple[dict[str, Any], ...]:
        """What is seen by equal shares of the heads, in order, each as keys of `ops.attention_pattern.Visibility`."""
        first = {"window": self.window, "dilation": self.dilation, "block_size": self.block_size,
                 "global_tokens": self.global_tokens, "memory": self.memory}
        return (first,) if self.stride is None else (first, {"dilation": self.stride})

    @property
    def _reach(self) -> int | None:
        """Within how many positions all keys of a query lie but for global ones; None is any distance."""
        if self.stride is not None:
            return None
        window = None if self.window is None else (self.window - 1) * self.dilation + 1
        block = None if self.block_size is None else self.block_size + self.memory
        return min((bound for bound in (window, block) if bound is not None), default=None)

    @property
    def seen(self) -> int | None:
        return None if self.global_tokens else self._reach

    @property
    def score_features(self) -> int:
        return self.num_heads * self.head_dim

    def holds_beyond(self, seq_len: int) -> bool:
        """Linear biases do, and windows that training has filled."""
        return self.positions == "alibi" or (self.seen or seq_len + 1) <= seq_len

    def summary(self) -> str:
        return f"{self.num_heads} heads on {self.num_kv_heads} key heads"

    def shrink(self, small: Small) -> Self:
        """Make sizes small: key heads that are cut stay cut, and what was shorter than a sequence stays so."""
        group, kv_heads = self.num_heads // self.num_kv_heads, self.num_kv_heads
        num_kv_heads = smallest_divisor(kv_heads, min(2, kv_heads), lambda heads: all(
            _path(heads, tp) == _path(kv_heads, tp) and heads * group % tp == 0 for tp in small.tps)
            and (self.stride is None or heads == 1 or heads % 2 == 0))
        group = smallest_divisor(
            group, min(2, group), lambda each: all(num_kv_heads * each % tp == 0 for tp in small.tps)
            and (self.stride is None or num_kv_heads * each % 2 == 0))
        return self.model_copy(update={
            "head_dim": 8, "num_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads,
            "window": small.length(self.window), "block_size": small.length(self.block_size),
            "dilation": min(self.dilation, 2), "stride": None if self.stride is None else min(self.stride, 3),
            "global_tokens": min(self.global_tokens, 2), "memory": self.memory and small.length(self.memory)})


def _keys(
    context: int, window: int | None = None, dilation: int = 1, block_size: int | None = None, global_tokens: int = 0,
    memory: int = 0,
) -> int:
    """Count the keys that a query after so many positions sees."""
    block = context if block_size is None else min(block_size + memory, context)
    local = min(window or context, -(-block // dilation))
    return min(local + global_tokens, context)


def _path(kv_heads: int, tp: int) -> str:
    """Name what tensor parallelism does with key heads."""
    if kv_heads % tp == 0:
        return "cut"
    return "shared" if tp % kv_heads == 0 else "neither"
