"""The scopes of the balance loss, over whose tokens it takes shares: a sequence, a micro-batch or the global batch.

The loss multiplies two means over the same tokens, the shares of the choices and the probabilities. It is linear in the
second: once the shares of a scope are known, its loss is a sum over tokens, of which each rank adds up its own. So only
choices are counted across ranks, in whole numbers.
"""

from __future__ import annotations

from torch import Tensor

from moescale.comm.collectives import Group, all_reduce_sum
from moescale.comm.sequence_shards import SequenceShards


class SequenceScope:
    """Balances each sequence by itself, whichever ranks hold its positions."""

    def total(self, choices: Tensor, sequence: SequenceShards) -> Tensor:
        """Add up choices over the scope.

        choices: [groups, experts] int64, of own tokens. -> [groups or 1, experts] int64
        """
        return sequence.sum(choices)


class MicroBatchScope(SequenceScope):
    """Balances the sequences of one pass together: `data.micro_batch` consecutive ones of the global batch."""

    def total(self, choices: Tensor, sequence: SequenceShards) -> Tensor:
        return sequence.sum(choices.sum(0, keepdim=True))


class GlobalBatchScope(SequenceScope):
    """Balances all sequences of a step together.

    When one pass sees them all, it adds up the choices over the ranks of `group` as it goes. When there are several
    passes, the first would have to know the last: then `counted` is set to what passes without gradients have counted.
    counted: [1, experts] int64, of the whole global batch. group: the ranks that share it; None = one process.
    """

    def __init__(self) -> None:
        self.group: Group = None
        self.counted: Tensor | None = None
        self.counting = False  # True while those passes run: each adds its own tokens' choices to `counted`

    def count_over(self, group: Group) -> None:
        """Add up the choices over the ranks of the group in the one pass that there is."""
        self.counted, self.group = None, group

    def begin_counting(self) -> None:
        """Count own tokens' choices in the passes to come."""
        self.counted, self.counting = None, True

    def end_counting(self, total: Tensor) -> None:
        """Take the choices of all ranks, [1, experts] int64, for the passes to come."""
        self.counted, self.counting = total, False

    def total(self, choices: Tensor, sequence: SequenceShards) -> Tensor:
        own = choices.sum(0, keepdim=True)
        if self.counting:
            self.counted = own if self.counted is None else self.counted + own
            return own
        return all_reduce_sum(own, self.group) if self.counted is None else self.counted


SCOPES: dict[str, type[SequenceScope]] = {
    "sequence": SequenceScope, "micro_batch": MicroBatchScope, "global_batch": GlobalBatchScope,
}
