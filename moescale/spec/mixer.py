"""What every kind of mixer answers for itself, so that nobody else asks which kind it is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

from moescale.spec.group import Group
from moescale.spec.small import Small
from moescale.spec.weights import Weight


class MixerConfig(Group):
    """The keys of one kind of mixer. Answers that only attention has are given here for all others."""

    @abstractmethod
    def weights(self, d_model: int, init: str) -> tuple[Weight, ...]:
        """Describe the weights of one layer. init: as `model.init`."""

    @abstractmethod
    def flops_per_token(self, d_model: int, context: int) -> int:
        """Count the forward pass of one token: two for each element of a matrix, and what mixes the positions."""

    @abstractmethod
    def state_bytes(self, d_model: int, batch: int, length: int, itemsize: int) -> int:
        """Count what generation keeps of `length` tokens. itemsize: of the numbers that a model computes in."""

    @abstractmethod
    def shrink(self, small: Small) -> Self:
        """Make sizes small, for a proof: the same structure, and the same path through the program."""

    @abstractmethod
    def summary(self) -> str:
        """Say in a few words how large a layer is."""

    def shares(self, d_model: int) -> dict[str, int]:
        """Give the sizes that the ranks of `tp` share out equally, each by the key that a user would change."""
        return {}

    def refuse(self, d_model: int, tp: int, cp: int) -> None:
        """Raise ConfigError, which says what works, for degrees in which this mixer cannot run."""

    def acts(self, key: str) -> bool:
        """Say whether a key of this group means anything beside the values of the others."""
        return key in type(self).model_fields

    @property
    def seen(self) -> int | None:
        """At how many positions each one looks, one by one: 0 for a recurrence; None is all before it."""
        return 0

    @property
    def score_features(self) -> int:
        """Count the features that a score is a product of, over all heads, in PaLM's count of FLOPs."""
        return 0

    def holds_beyond(self, seq_len: int) -> bool:
        """Say whether a model that was trained on sequences of this length can read longer ones."""
        return True
