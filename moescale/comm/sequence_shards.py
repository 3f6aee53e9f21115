"""Where the positions of each sequence lie: all on this rank, or shared by the ranks of `cp` and `tp`.

Between blocks a rank holds its *own* positions. A mixer's matrices are cut over `tp`, whose ranks then work on their
*part* of the sequence together: they gather it, and share out the sums of what they made of it (Korthikanti et al.,
2022, sec. 4.2.2). What decides about tokens (positions, token ids) every rank has *whole*.

A recurrence runs over each *piece* of a sequence by itself, pieces in the place of rows of a batch. What one piece
leaves behind, the next one begins with, on whatever rank it lies: its state (`recur`), its last inputs (`before`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moescale.comm.collectives import Group, all_gather, all_reduce_sum, gather_sequence, scatter_sequence

Run = Callable[[Tensor | None], tuple[Tensor, Tensor]]
"""Runs a recurrence over the pieces here: the state before each, [rows, ...] or None for zeros -> outputs, last states.

It begins again from zero wherever a document does.
"""
Passes = Tensor | Callable[[Tensor, Tensor], Tensor]
"""What a piece without the beginning of a document does to the state before it, apart from what its inputs add.

Either a factor of each element, [rows, ...], computed where the piece lies; or a function of the state [batch, ...] and
the piece's positions [batch, length], which every rank can compute for every piece.
"""


class SequenceShards:
    """All positions are on this rank: nothing to do."""

    @property
    def hands_on(self) -> bool:
        """Say whether pieces begin with the state of others: a state at the end is for them, or for generation."""
        return False

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

    def apart(self, part: Tensor) -> Tensor:
        """Make each piece that is here a row. [batch, seq/cp, ...] -> [rows, length, ...]"""
        return part

    def together(self, pieces: Tensor) -> Tensor:
        """Join the pieces of each sequence that are here: the reverse of `apart`."""
        return pieces

    def before(self, pieces: Tensor, count: int) -> Tensor:
        """Fetch the last inputs before each piece, zeros before a sequence.

        pieces: [rows, length, ...]. Returns [rows, count, ...]. They may belong to another document.
        """
        return pieces.new_zeros(len(pieces), count, *pieces.shape[2:])

    def recur(self, run: Run, passes: Passes, positions: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run a recurrence over the pieces here, each from the state in which the piece before it ends.

        run, passes: see `Run` and `Passes`. positions: [batch, seq] int64, whole. first: the state before the sequence,
        None = zeros; where sequences are shared, there is none. Returns what `run` gives.
        """
        return run(first)

    def first_states(self, last: Tensor, passes: Passes, positions: Tensor) -> Tensor:
        """Work out the state before each piece here, for a recurrence whose outputs are sums over inputs and states.

        last: [rows, ...], the states at the ends of the pieces, begun from zero. Others as in `recur`. Returns such
        before their beginnings.
        """
        return torch.zeros_like(last)


class SharedSequenceShards(SequenceShards):
    """Pieces of equal length are dealt out over `cp`; each rank's pieces, in order, are its part, cut over `tp`."""

    def __init__(
        self, pieces: Sequence[Sequence[int]], cp_rank: int, tp_rank: int, tp: int, *, tp_group: Group, cp_group: Group,
        group: Group, compiled: bool = False,
    ) -> None:
        """pieces: for each rank of cp, the pieces that it holds. group: all ranks of cp and tp. compiled: callers."""
        self.pieces, self.cp_rank, self.tp_rank, self.tp = pieces, cp_rank, tp_rank, tp
        self.tp_group, self.cp_group, self.group = tp_group, cp_group, group
        self._gather, self._scatter = gather_sequence, scatter_sequence
        if compiled:
            self._gather, self._scatter = torch.compiler.disable(self._gather), torch.compiler.disable(self._scatter)

    @property
    def hands_on(self) -> bool:
        return len(self.pieces) > 1

    @property
    def num_pieces(self) -> int:
        return sum(len(held) for held in self.pieces)

    @property
    def _here(self) -> Sequence[int]:
        """The pieces of this rank."""
        return self.pieces[self.cp_rank]

    @property
    def _places(self) -> list[int]:
        """Where each piece lies when those of all ranks are joined, rank by rank."""
        dealt = [piece for held in self.pieces for piece in held]
        return [dealt.index(piece) for piece in range(self.num_pieces)]

    def part(self, whole: Tensor) -> Tensor:
        cut = whole.unflatten(1, (self.num_pieces, -1))
        return torch.cat([cut[:, piece] for piece in self._here], 1)

    def own(self, whole: Tensor) -> Tensor:
        return self.part(whole).chunk(self.tp, 1)[self.tp_rank]

    def gather(self, own: Tensor) -> Tensor:
        return self._gather(own, self.tp_group) if self.tp > 1 else own

    def scatter(self, part: Tensor) -> Tensor:
        return self._scatter(part, self.tp_group) if self.tp > 1 else part

    def whole(self, own: Tensor) -> Tensor:
        gathered = all_gather(own, self.group).transpose(0, 1).flatten(1, 2)  # [batch, seq, ...], rank by rank
        cut = gathered.unflatten(1, (self.num_pieces, -1))
        return torch.cat([cut[:, place] for place in self._places], 1)

    def sum(self, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone(), self.group)

    def apart(self, part: Tensor) -> Tensor:
        return part.unflatten(1, (len(self._here), -1)).flatten(0, 1)

    def together(self, pieces: Tensor) -> Tensor:
        return pieces.unflatten(0, (-1, len(self._here))).flatten(1, 2)

    def before(self, pieces: Tensor, count: int) -> Tensor:
        if len(self.pieces) == 1:
            return super().before(pieces, count)
        tails = self._of_all_ranks(pieces[:, -count:])  # [batch, num_pieces, at most count, ...]
        size = tails.shape[2]
        joined = torch.cat((tails.new_zeros(len(tails), count, *tails.shape[3:]), tails.flatten(1, 2)), 1)
        return torch.stack([joined[:, piece * size : piece * size + count] for piece in self._here], 1).flatten(0, 1)

    def recur(self, run: Run, passes: Passes, positions: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert first is None, "a state is for one process"
        if len(self.pieces) == 1:
            return run(None)
        _, last = run(None)
        return run(self.first_states(last, passes, positions))

    def first_states(self, last: Tensor, passes: Passes, positions: Tensor) -> Tensor:
        # Every rank goes over the pieces of all.
        # One exchange for both, so that backward makes it on every rank, also where nothing comes before.
        sent = [last, passes] if isinstance(passes, Tensor) else [last]
        sizes = [each[0].numel() for each in sent]
        gathered = self._of_all_ranks(torch.cat([each.flatten(1) for each in sent], 1)).split(sizes, 2)
        lasts = gathered[0].unflatten(2, last.shape[1:])
        at = positions.unflatten(1, (self.num_pieces, -1))
        state = lasts[:, 0].masked_fill(torch.ones((), dtype=torch.bool, device=last.device), 0)
        before = []
        for piece in range(self.num_pieces):
            before.append(state)
            if isinstance(passes, Tensor):
                state = state * gathered[1][:, piece].unflatten(1, passes.shape[1:])
            else:
                state = passes(state, at[:, piece])
            begins = (at[:, piece] == 0).any(1).view(-1, *[1] * (state.dim() - 1))
            state = state.masked_fill(begins, 0) + lasts[:, piece]
        return torch.stack([before[piece] for piece in self._here], 1).flatten(0, 1)

    def _of_all_ranks(self, rows: Tensor) -> Tensor:
        """Bring together a row for each piece of the sequences. [rows, ...] -> [batch, num_pieces, ...], in order"""
        if rows.is_complex():
            return torch.view_as_complex(self._of_all_ranks(torch.view_as_real(rows)))
        held = rows.unflatten(0, (-1, len(self._here)))
        return self._gather(held, self.cp_group)[:, self._places]
