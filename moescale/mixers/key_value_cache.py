"""What attention keeps of the tokens that it has seen: their keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from moescale.mixers.base import State


class KeyValueCache(State):
    """Keys and values of the last tokens: the token that came n-th lies in slot n modulo the number of slots.

    All rows of the batch take tokens at the same time. keys, values: [batch, kv_heads, slots, head_dim].
    seen: tokens that came so far. rolls: the newest token may take the place of the oldest one. global_tokens: so many
    first tokens of each row's document are kept beside, in global_keys and global_values.
    """

    def __init__(
        self, batch: int, slots: int, kv_heads: int, head_dim: int, *, rolls: bool, dtype: torch.dtype,
        device: torch.device, global_tokens: int = 0,
    ) -> None:
        self.keys = torch.empty(batch, kv_heads, slots, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.slots, self.rolls, self.seen = slots, rolls, 0
        self.global_tokens = global_tokens
        self.global_keys = self.keys.new_zeros(batch, kv_heads, global_tokens, head_dim)
        self.global_values = torch.zeros_like(self.global_keys)

    @property
    def held(self) -> int:
        """How many tokens lie here."""
        return min(self.seen, self.slots)

    def add(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Take tokens in.

        keys, values: [batch, seq, kv_heads, head_dim]. positions: [batch, seq or more] int64, the last ones are theirs.
        """
        if self.global_tokens:
            self._keep_global(keys, values, positions[:, -keys.shape[1] :])
        first, self.seen = self.seen, self.seen + keys.shape[1]
        assert self.rolls or self.seen <= self.slots, "the state was made for fewer tokens"
        first = max(first, self.seen - self.slots)
        for held, new in ((self.keys, keys), (self.values, values)):
            new = new[:, first - self.seen :].transpose(1, 2)
            if new.shape[2] == 1:
                held[:, :, first % self.slots] = new[:, :, 0]
            else:
                held[:, :, torch.arange(first, self.seen, device=held.device) % self.slots] = new.to(held.dtype)

    def _keep_global(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        place = torch.arange(keys.shape[1], device=keys.device)
        newest = place >= place[-1] - positions[:, -1:]  # of the document that goes on
        row, token = (newest & (positions < self.global_tokens)).nonzero(as_tuple=True)
        for held, new in ((self.global_keys, keys), (self.global_values, values)):
            held[row, :, positions[row, token]] = new[row, token].to(held.dtype)

    def newest_last(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the tokens that lie here in the order in which they came.

        Each is [batch, held, kv_heads, head_dim].
        """
        turn = -(self.seen % self.slots) if self.seen > self.slots else 0
        keys, values = (each[:, :, : self.held].roll(turn, 2).transpose(1, 2) for each in (self.keys, self.values))
        return keys, values

    def in_use(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values [batch, kv_heads, keys, head_dim] in the order of the slots, and their age.

        positions: [batch, 1] int64, of the newest tokens. The age is how many tokens came after this one: [keys] int64,
        or [batch, keys] with global tokens, where it is -1 for those that lie in a slot, too, or have not come.
        """
        age = (self.seen - 1 - torch.arange(self.held, device=self.keys.device)) % self.slots
        keys, values = self.keys[:, :, : self.held], self.values[:, :, : self.held]
        if not self.global_tokens:
            return keys, values, age
        global_age = positions - torch.arange(self.global_tokens, device=age.device)
        global_age = global_age.masked_fill(global_age < self.held, -1)
        return (torch.cat((self.global_keys, keys), 2), torch.cat((self.global_values, values), 2),
                torch.cat((global_age, age.expand(len(global_age), -1)), 1))

    def aged(self, age: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of tokens after which so many came. Each is [batch, kv_heads, ages, head_dim]."""
        slot = (self.seen - 1 - age) % self.slots
        return self.keys[:, :, slot], self.values[:, :, slot]

    def select(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.global_keys = self.global_keys.index_select(0, rows)
        self.global_values = self.global_values.index_select(0, rows)

    def num_bytes(self) -> int:
        return sum(x.nbytes for x in (self.keys, self.values, self.global_keys, self.global_values))
