"""The Legendre memory unit (LMU): its keys, and the weights of one layer."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from moescale.errors import refuse
from moescale.spec.mixer import MixerConfig
from moescale.spec.small import Small, smallest_multiple
from moescale.spec.weights import Init, Weight, matrix


class LmuConfig(MixerConfig):
    memories: int = Field(8, ge=1)
    """Signals that a layer remembers, each a projection of the features."""
    order: int = Field(32, ge=1)
    """Numbers in which each signal is remembered: about four for each wave that the window may hold."""
    theta: float = Field(128.0, gt=0)
    """Positions of the window that is remembered."""
    units: int = Field(256, ge=1)
    """Hidden units, which see the features and all memories."""
    recurrent: bool = False
    """Whether units, and the signals, see what units and memories were one position earlier: the paper's cell."""

    def weights(self, d_model: int, init: str) -> tuple[Weight, ...]:
        """Describe the encoders e of the signals, the kernels w of the hidden units, and the projection from these."""
        held = self.memories * self.order
        e_x = _matrix(("e_x", "weight"), self.memories, d_model, ("memories", "d_model"), d_model**-0.5)
        o = matrix("o", (d_model, self.units), ("d_model", "units"), "units", init)
        if not self.recurrent:
            return (e_x, self._kernel(("w_x", "weight"), d_model, "d_model"),
                    self._kernel(("w_m", "weight"), held, "memories"), o)
        return (
            e_x, self._kernel(("w_x", "weight"), d_model, "d_model"),
            _matrix(("cell", "e_h"), self.memories, self.units, ("memories", "units"), self.units**-0.5),
            _matrix(("cell", "e_m"), self.memories, held, ("memories", "inputs"), 0.0),
            self._kernel(("cell", "w_h"), self.units, "inputs"), self._kernel(("cell", "w_m"), held, "memories"), o,
        )

    def _kernel(self, name: tuple[str, ...], inputs: int, dim: str) -> Weight:
        """Describe a matrix of the hidden units, drawn as Glorot and Bengio (2010) do.

        A cell that runs position by position needs all its units, whole on every rank.
        """
        cut = None if self.recurrent else "units"
        return _matrix(name, self.units, inputs, ("units", dim), (2 / (self.units + inputs)) ** 0.5, cut)

    def flops_per_token(self, d_model: int, context: int) -> int:
        """Count the forward pass of one token: its matrices, and a step of the memories."""
        products = 2 * sum(weight.size for weight in self.weights(d_model, "normal"))
        return products + 2 * self.memories * self.order * (self.order + 1)

    def state_bytes(self, d_model: int, batch: int, length: int, itemsize: int) -> int:
        """Count the memories, and the units that the next position sees, at least in float32."""
        numbers = self.memories * self.order + (self.units if self.recurrent else 0)
        return batch * numbers * max(4, itemsize)

    def shares(self, d_model: int) -> dict[str, int]:
        return {"lmu.units": self.units}

    def refuse(self, d_model: int, tp: int, cp: int) -> None:
        refuse(self.recurrent and cp > 1,
               f"parallel.cp={cp} cannot share a sequence whose units see themselves one position earlier: "
               "use parallel.cp=1, or lmu.recurrent=false")

    def shrink(self, small: Small) -> Self:
        theta = max(2.0, self.theta * small.small_seq_len / small.seq_len)
        return self.model_copy(update={
            "memories": 2, "order": 4, "theta": theta, "units": smallest_multiple(4, small.tps)})

    def summary(self) -> str:
        return f"{self.units} units on {self.memories} memories of order {self.order}"


def _matrix(
    name: tuple[str, ...], outputs: int, inputs: int, dims: tuple[str, str], std: float, cut: str | None = None
) -> Weight:
    """Describe a matrix of the cell, which starts as the LMU's paper says, whatever `model.init` is."""
    init = Init("normal", std) if std else Init("zeros")
    return Weight(name, (outputs, inputs), dims, cut, "dense" if cut else "shared", init)
