"""Where the positions of each sequence lie: all on this rank, or shared by the ranks of `cp` and `tp`.

Between blocks a rank holds its *own* positions. A mixer's matrices are cut over `tp`, whose ranks then work on their
*part* of the sequence together: they gather it, and share out the sums of what they made of it (Korthikanti et al.,
2022, sec. 4.2.2). What decides about tokens (positions, token ids) every rank has *whole*.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moescale.comm.collectives import Group, all_gather, all_reduce_sum, gather_sequence, scatter_sequence


class SequenceShards:
    """All positions are on this rank: nothing to do."""

    def part(self, whole: Tensor) -> Tensor:
        """[batch, seq, ...] -> [batch, seq/cp, ...]"""
        return whole

    def own(self, whole: Tensor) -> Tensor:
        """[batch, seq, ...] -> [batch, seq/cp/tp, ...]"""
        return whole

    def gather(self, own: Tensor) -> Tensor:
        """Gather the part from its ranks. [batch, seq/cp/tp, d_model] -> [batch, seq/cp, d_model]"""
        return own

    def scatter(self, part: Tensor) -> Tensor:
        """Add up the part over its ranks, and keep the own positions. The reverse of `gather`, as its gradient is."""
        return part

    def whole(self, own: Tensor) -> Tensor:
        """Gather integers of all positions, in order, outside autograd. [batch, seq/cp/tp, ...] -> [batch, seq, ...]"""
        return own

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up over the ranks that share the sequences, outside autograd."""
        return tensor


class SharedSequenceShards(SequenceShards):
    """Pieces of equal length are dealt out over `cp`; each rank's pieces, in order, are its part, cut over `tp`."""

    def __init__(
        self, pieces: Sequence[Sequence[int]], cp_rank: int, tp_rank: int, tp: int, *, tp_group: Group, group: Group,
        compiled: bool = False,
    ) -> None:
        """pieces: for each rank of cp, the pieces that it holds. group: all ranks of cp and tp. compiled: callers."""
        self.pieces, self.cp_rank, self.tp_rank, self.tp = pieces, cp_rank, tp_rank, tp
        self.tp_group, self.group = tp_group, group
        self._gather, self._scatter = gather_sequence, scatter_sequence
        if compiled:
            self._gather, self._scatter = torch.compiler.disable(self._gather), torch.compiler.disable(self._scatter)

    @property
    def num_pieces(self) -> int:
        return sum(len(held) for held in self.pieces)

    def part(self, whole: Tensor) -> Tensor:
        cut = whole.unflatten(1, (self.num_pieces, -1))
        return torch.cat([cut[:, piece] for piece in self.pieces[self.cp_rank]], 1)

    def own(self, whole: Tensor) -> Tensor:
        return self.part(whole).chunk(self.tp, 1)[self.tp_rank]

    def gather(self, own: Tensor) -> Tensor:
        return self._gather(own, self.tp_group) if self.tp > 1 else own

    def scatter(self, part: Tensor) -> Tensor:
        return self._scatter(part, self.tp_group) if self.tp > 1 else part

    def whole(self, own: Tensor) -> Tensor:
        gathered = all_gather(own, self.group).transpose(0, 1).flatten(1, 2)  # [batch, seq, ...], rank by rank
        cut, dealt = gathered.unflatten(1, (self.num_pieces, -1)), [piece for held in self.pieces for piece in held]
        return torch.cat([cut[:, dealt.index(piece)] for piece in range(self.num_pieces)], 1)

    def sum(self, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone(), self.group)
