"""What a recurrent mixer keeps of the tokens that it has seen: the same few numbers, however many they were."""

from __future__ import annotations

from torch import Tensor

from moescale.mixers.base import State


class RecurrentState(State):
    """Tensors by name, each [batch, ...]: the state of the recurrence, the last inputs of a convolution."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def update(self, **tensors: Tensor) -> None:
        """Put new values in the place of old ones."""
        assert tensors.keys() <= self.tensors.keys(), "a state keeps its names"
        self.tensors.update(tensors)

    def select(self, rows: Tensor) -> None:
        self.tensors = {name: tensor.index_select(0, rows) for name, tensor in self.tensors.items()}

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())
