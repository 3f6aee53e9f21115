"""What attention keeps of the tokens that it has seen: their keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from moescale.mixers.base import State


class KeyValueCache(State):
    """Keys and values of the last tokens: the token that came n-th lies in slot n modulo the number of slots.

    All rows of the batch take tokens at the same time. keys, values: [batch, kv_heads, slots, head_dim].
    seen: tokens that came so far. rolls: the newest token may take the place of the oldest one.
    """

    def __init__(
        self, batch: int, slots: int, kv_heads: int, head_dim: int, *, rolls: bool, dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys = torch.empty(batch, kv_heads, slots, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.slots, self.rolls, self.seen = slots, rolls, 0

    @property
    def held(self) -> int:
        """How many tokens lie here."""
        return min(self.seen, self.slots)

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Take tokens in. keys, values: [batch, seq, kv_heads, head_dim]"""
        first, self.seen = self.seen, self.seen + keys.shape[1]
        assert self.rolls or self.seen <= self.slots, "the state was made for fewer tokens"
        first = max(first, self.seen - self.slots)
        for held, new in ((self.keys, keys), (self.values, values)):
            new = new[:, first - self.seen :].transpose(1, 2)
            if new.shape[2] == 1:
                held[:, :, first % self.slots] = new[:, :, 0]
            else:
                held[:, :, torch.arange(first, self.seen, device=held.device) % self.slots] = new.to(held.dtype)

    def newest_last(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the tokens that lie here in the order in which they came.

        Each is [batch, held, kv_heads, head_dim].
        """
        turn = -(self.seen % self.slots) if self.seen > self.slots else 0
        keys, values = (each[:, :, : self.held].roll(turn, 2).transpose(1, 2) for each in (self.keys, self.values))
        return keys, values

    def slots_in_use(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values [batch, kv_heads, held, head_dim] in the order of the slots, and their age.

        The age is [held] int64: how many tokens came after this one.
        """
        slot = torch.arange(self.held, device=self.keys.device)
        age = (self.seen - 1 - slot) % self.slots
        return self.keys[:, :, : self.held], self.values[:, :, : self.held], age

    def select(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
