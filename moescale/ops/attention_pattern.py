"""The pattern of an attention (which keys each query sees, and the bias of its scores), shared by all backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionPattern:
    """Which keys a query sees: a contiguous run of positions that contains its own.

    The queries belong to the last positions of the keys. window: how many keys a query sees at most, counted back from
    itself. positions: [batch, seq_k] int64, restart at 0 with a document; None when no document begins inside.
    slopes: [heads] float32, what a score loses per position between. scale: factor of the scores.
    """

    causal: bool
    window: int | None
    positions: Tensor | None
    slopes: Tensor | None
    scale: float

    def documents(self) -> tuple[Tensor, Tensor]:
        """Find the first and the last position of each position's document. -> two of [batch, seq_k] int64"""
        assert self.positions is not None
        index = torch.arange(self.positions.shape[1], device=self.positions.device)
        begins = self.positions == 0
        first = torch.where(begins, index, 0).cummax(1).values
        after = torch.where(begins, index, len(index)).roll(-1, 1)  # where the next one begins, if it is the next
        after[:, -1:] = len(index)
        return first, after.flip(1).cummin(1).values.flip(1) - 1

    def visible(self, queries: slice, keys: slice, seq_q: int, seq_k: int, device: torch.device) -> Tensor:
        """Mark which of these keys these queries see. -> [queries, keys] bool; [batch, queries, keys] with documents"""
        behind = self._distance(queries, keys, seq_k - seq_q, device)
        mask = behind >= 0 if self.causal else torch.ones_like(behind, dtype=torch.bool)
        if self.window is not None:
            mask &= behind < self.window
        if self.positions is not None:
            document = (self.positions == 0).cumsum(1)
            query_document = document[:, queries.start + seq_k - seq_q : queries.stop + seq_k - seq_q]
            mask = mask & (query_document.unsqueeze(2) == document[:, keys].unsqueeze(1))
        return mask

    def bias(
        self, queries: slice, keys: slice, seq_q: int, seq_k: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Compute what to add to the scores, -inf where nothing is seen. -> [batch or 1, heads or 1, queries, keys]"""
        sees = self.visible(queries, keys, seq_q, seq_k, device).unsqueeze(-3)
        sees = sees if sees.ndim == 4 else sees.unsqueeze(0)
        if self.slopes is None:
            return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, float("-inf"))
        behind = self._distance(queries, keys, seq_k - seq_q, device).abs()
        return (-self.slopes.to(dtype).view(-1, 1, 1) * behind).masked_fill(~sees, float("-inf"))

    @staticmethod
    def _distance(queries: slice, keys: slice, shift: int, device: torch.device) -> Tensor:
        """Compute how many positions each key lies behind each query. -> [queries, keys] int64"""
        query = torch.arange(queries.start + shift, queries.stop + shift, device=device)
        return query.unsqueeze(1) - torch.arange(keys.start, keys.stop, device=device)
