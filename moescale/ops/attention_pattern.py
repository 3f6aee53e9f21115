"""The pattern of an attention (which keys each query sees, and the bias of its scores), shared by all backends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Remembered = tuple[Tensor | None, Tensor | None]
"""Keys and values as queries of later blocks see them: see `attention`."""
NOTHING: Remembered = (None, None)


@dataclass(frozen=True)
class Visibility:
    """Which keys of its document's past a query sees: the one rule of masks, of blocks that are skipped, and of caches.

    window: how many keys, counted back from itself; None = all. dilation: it sees every dilation-th of them, itself
    included. block_size: documents are cut into blocks of so many positions, and it sees its own block alone.
    global_tokens: beside all this, it sees the first so many positions of its document. memory: so many positions
    before its block it sees, too (Transformer-XL's segments).
    """

    window: int | None = None
    dilation: int = 1
    block_size: int | None = None
    global_tokens: int = 0
    memory: int = 0

    @property
    def reach(self) -> int | None:
        """Within how many positions, itself included, a query's keys lie, global ones apart; None = of any distance."""
        window = None if self.window is None else (self.window - 1) * self.dilation + 1
        block = None if self.block_size is None else self.block_size + self.memory
        return min((bound for bound in (window, block) if bound is not None), default=None)

    def sees(self, behind: Tensor, position: Tensor) -> Tensor:
        """Mark the keys that a query sees.

        behind: int64, how many positions a key lies behind its query. position: int64, the query's place in its
        document. Both are broadcast. Returns bool.
        """
        past = (behind >= 0) & (behind <= position)
        local = past if self.window is None else past & (behind < self.window * self.dilation)
        if self.dilation > 1:
            local = local & (behind % self.dilation == 0)
        if self.block_size is not None:
            local = local & (behind <= position % self.block_size + self.memory)
        return local | (past & (position - behind < self.global_tokens)) if self.global_tokens else local


@dataclass(frozen=True)
class AttentionPattern:
    """Which keys a query sees, and what its scores lose with distance.

    The queries belong to the last positions of the keys. visibility: in causal use, which of the past.
    positions: [batch, seq_k] int64, restart at 0 with a document; None when no document begins inside.
    slopes: [heads] float32, what a score loses per position between. scale: factor of the scores.
    """

    causal: bool
    visibility: Visibility
    positions: Tensor | None
    slopes: Tensor | None
    scale: float

    @property
    def window(self) -> int | None:
        """How many keys a query sees, where that is all that hides some: other backends never get more to hide."""
        return self.visibility.window

    def documents(self) -> tuple[Tensor, Tensor]:
        """Find the first and the last position of each position's document. -> two of [batch, seq_k] int64"""
        assert self.positions is not None
        index = torch.arange(self.positions.shape[1], device=self.positions.device)
        begins = self.positions == 0
        first = torch.where(begins, index, 0).cummax(1).values
        after = torch.where(begins, index, len(index)).roll(-1, 1)  # where the next one begins, if it is the next
        after[:, -1:] = len(index)
        return first, after.flip(1).cummin(1).values.flip(1) - 1

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Find the first key that each position sees as a query, and the last query that sees it as a key.

        What lies between is seen, too: global tokens, dilations and windows are not looked at. -> two of [batch, seq_k]
        int64, none of which ever decreases
        """
        first, last = self.documents()
        size, memory = self.visibility.block_size, self.visibility.memory
        if size is not None:
            assert self.positions is not None
            index = torch.arange(self.positions.shape[1], device=self.positions.device)
            first = torch.maximum(first, index - self.positions % size - memory)
            last = torch.minimum(last, index + size - 1 + memory - (self.positions + memory) % size)
        return first, last

    def first_keys(self, seq_q: int, seq_k: int) -> Tensor:
        """Find the first key that each of the last seq_q positions sees, global tokens apart, in causal use.

        Returns [batch or 1, seq_q] int64, never decreasing.
        """
        if self.visibility.memory:
            return self.bounds()[0][:, seq_k - seq_q :]
        index, reach = torch.arange(seq_k, device="cpu"), self.visibility.reach
        first = (torch.zeros_like(index) if reach is None else (index - reach + 1).clamp(min=0)).unsqueeze(0)
        if self.positions is not None:
            first = torch.maximum(first, self.documents()[0])
        return first[:, seq_k - seq_q :]

    @property
    def without_memory(self) -> AttentionPattern:
        """The same, where a query sees its own block alone."""
        return replace(self, visibility=replace(self.visibility, memory=0))

    def global_keys(self, first: int, device: torch.device) -> Tensor | None:
        """Find the global tokens, before key `first`, of the documents that this key belongs to.

        Returns [batch or 1, tokens] int64, increasing; those from `first` on are none. None where there cannot be any.
        """
        if not self.visibility.global_tokens or not first:
            return None
        begins = torch.zeros(1, 1, dtype=torch.int64, device=device)
        if self.positions is not None:
            begins = self.documents()[0][:, first : first + 1]
        return begins + torch.arange(min(self.visibility.global_tokens, first), device=device)

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Mark which of these keys these queries see.

        query: [queries] int64, places among the keys. key: [keys] or [batch, keys] int64. Returns [queries, keys] bool,
        or [batch, queries, keys] with documents.
        """
        behind = query.unsqueeze(-1) - key.unsqueeze(-2)
        if self.causal:
            position = query if self.positions is None else self.positions[:, query]
            return self.visibility.sees(behind, position.unsqueeze(-1))
        if self.positions is None:
            return torch.ones_like(behind, dtype=torch.bool)
        document = (self.positions == 0).cumsum(1)
        return document[:, query].unsqueeze(2) == document[:, key].unsqueeze(1)

    def bias(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute what to add to the scores, -inf where nothing is seen. -> [batch or 1, heads or 1, queries, keys]"""
        sees = for_heads(self.visible(query, key))
        if self.slopes is None:
            return torch.zeros(sees.shape, dtype=dtype, device=key.device).masked_fill_(~sees, float("-inf"))
        behind = for_heads((query.unsqueeze(-1) - key.unsqueeze(-2)).abs())
        return (-self.slopes.to(dtype).view(-1, 1, 1) * behind).masked_fill(~sees, float("-inf"))


def for_heads(pairs: Tensor) -> Tensor:
    """Make room for heads. [queries, keys] or [batch, queries, keys] -> [batch or 1, 1, queries, keys]"""
    return (pairs if pairs.dim() == 3 else pairs.unsqueeze(0)).unsqueeze(1)
