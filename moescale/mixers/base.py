"""What every mixer answers, and what it keeps of the tokens that it has seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor, nn

from moescale.comm.placement import Placement


class State(ABC):
    """What a mixer keeps of the tokens of a batch for those that follow, row by row."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may stand several times. rows: [any] int64"""

    @abstractmethod
    def num_bytes(self) -> int:
        """Count the bytes of the tensors that it holds."""


S = TypeVar("S", bound=State)


class Mixer(nn.Module, ABC, Generic[S]):
    """Let the tokens of a sequence meet each other."""

    @abstractmethod
    def forward(self, x: Tensor, positions: Tensor, state: S | None = None) -> Tensor:
        """Mix each token with those before it in its document.

        x: [batch, seq, d_model]. positions: [batch, seq] int64, restart at 0 with a document. state: of the tokens
        before these, from which it goes on; it then holds these, too. Returns features like x.
        """

    @abstractmethod
    def attach(self, placement: Placement) -> None:
        """Learn which positions are here and which share of the weights."""

    @abstractmethod
    def new_state(self, batch: int, length: int) -> S:
        """Make the state of `batch` rows that have seen nothing yet and will see at most `length` tokens."""
