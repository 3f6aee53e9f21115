"""Context parallelism: each rank has pieces of every sequence, and fetches the keys and values that they look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moescale.comm.collectives import Group
from moescale.comm.exchange import AllToAll, AsyncExchange
from moescale.ops.attention import attention
from moescale.ops.attention_pattern import NOTHING, Remembered, Visibility
from moescale.ops.permute import permute, reorder


def deal_pieces(cp: int, pieces: int) -> list[list[int]]:
    """Deal the pieces of a sequence out over the ranks: one each, or one from both ends (the causal mask's balance)."""
    if pieces == cp:
        return [[rank] for rank in range(cp)]
    return [[rank, 2 * cp - 1 - rank] for rank in range(cp)]


@dataclass(frozen=True)
class _Plan:
    """Who sends what. All positions are numbers in the whole sequence.

    token: [sent] int64, the own place that each row copies. row: [seq/cp, ranks] int64, its inverse; -1 = not sent.
    send, receive: rows per rank. order, inverse: from arrival to increasing position, and back.
    keys: for each own piece, where its keys lie among the rows received.
    """

    token: Tensor
    row: Tensor
    send: list[int]
    receive: list[int]
    order: Tensor
    inverse: Tensor
    keys: list[tuple[int, int]]


class ContextAttention(nn.Module):
    """Attention of this rank's queries to the keys of all ranks, each of which sends what is looked at and no more."""

    def __init__(self, pieces: list[list[int]], rank: int, group: Group) -> None:
        """pieces: for each rank of the group, the pieces that it holds, in order."""
        super().__init__()
        self.pieces, self.rank, self.group = pieces, rank, group
        self._plans: dict[tuple[int, int | None, torch.device], _Plan] = {}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, visibility: Visibility = Visibility(),  # noqa: B008
        positions: Tensor | None = None, alibi_slopes: Tensor | None = None, remembered: Remembered = NOTHING,
    ) -> Tensor:
        """Attend as `attention` does.

        q, k, v, remembered: [batch, seq/cp, heads or kv_heads, head_dim]. positions: [batch, seq], whole. -> like q
        """
        batch, length, kv_heads, head_dim = k.shape
        seq = length * len(self.pieces)
        # Documents, and so their global tokens, may begin anywhere before.
        plan = self._plan(seq, None if visibility.global_tokens else visibility.reach, k.device)
        sent = [k, v, *(each for each in remembered if each is not None)]
        features = torch.cat(sent, 2).transpose(0, 1).flatten(1)  # [seq/cp, batch x (2 or 4) x kv_heads x head_dim]
        exchange = AllToAll(plan.send, plan.receive, self.group, "attention's keys and values")
        rows = AsyncExchange.start(permute(features, plan.token, plan.row), exchange).finish()
        rows = reorder(rows, plan.order, plan.inverse)
        k, v, *later = rows.view(-1, batch, len(sent) * kv_heads, head_dim).transpose(0, 1).split(kv_heads, 2)
        piece_length = seq // sum(len(held) for held in self.pieces)
        outs = []
        for queries, piece, (first, last) in zip(
            q.split(piece_length, 1), self.pieces[self.rank], plan.keys, strict=True
        ):
            end = (piece + 1) * piece_length
            seen = None if positions is None else positions[:, end - (last - first) : end]
            memory_k, memory_v = (each[:, first:last] for each in later) if later else NOTHING
            outs.append(attention(queries, k[:, first:last], v[:, first:last], positions=seen,
                                  alibi_slopes=alibi_slopes, remembered=(memory_k, memory_v), **vars(visibility)))
        return torch.cat(outs, 1)

    def _plan(self, seq: int, reach: int | None, device: torch.device) -> _Plan:
        key = (seq, reach, device)
        if key not in self._plans:
            self._plans[key] = self._make_plan(seq, reach, device)
        return self._plans[key]

    def _make_plan(self, seq: int, reach: int | None, device: torch.device) -> _Plan:
        ranks = len(self.pieces)
        length = seq // sum(len(held) for held in self.pieces)
        position = torch.arange(seq)
        needed = []  # a mask of positions for each rank
        for held in self.pieces:
            needed.append(torch.zeros(seq, dtype=torch.bool))
            for piece in held:
                needed[-1][self._first_key(piece * length, reach) : (piece + 1) * length] = True
        owned = [torch.cat([position[piece * length : (piece + 1) * length] for piece in held]) for held in self.pieces]
        own = owned[self.rank]
        wanted = torch.stack([needed[rank][own] for rank in range(ranks)])  # [ranks, seq/cp]
        token = wanted.nonzero()[:, 1]
        row = torch.where(wanted, wanted.flatten().cumsum(0).view_as(wanted) - 1, -1).T.contiguous()
        sources = [held[needed[self.rank][held]] for held in owned]
        order = torch.cat(sources).argsort()
        slot = needed[self.rank].cumsum(0) - 1  # of a position among the rows received
        keys = []
        for piece in self.pieces[self.rank]:
            first = self._first_key(piece * length, reach)
            keys.append((int(slot[first]), int(slot[(piece + 1) * length - 1]) + 1))
        return _Plan(
            token.to(device), row.to(device), wanted.sum(1).tolist(), [len(source) for source in sources],
            order.to(device), order.argsort().to(device), keys,
        )

    @staticmethod
    def _first_key(first_query: int, reach: int | None) -> int:
        return 0 if reach is None else max(0, first_query - reach + 1)
