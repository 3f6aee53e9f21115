"""Fingerprints: two checkpoints hold the same model if theirs are equal, whatever format, layout and dtype they are in.

A weight counts by its value: bfloat16 and the float32 it widens to are the same. An expert is its matrices and its row
of the router, so that experts that change places take their fingerprints with them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from moescale.convert.mapping.table import NativeName, Weights
from moescale.spec.weights import Weight

BLOCK = 1 << 20  # elements taken at a time


def digests(weight: Weight, values: Tensor) -> list[str]:
    """Hash a native tensor. Returns one digest, or one of each row where each row is an expert's."""
    parts = values if has_rows(weight) else [values]
    return [Digest(part.shape).update(part).hex() for part in parts]


def has_rows(weight: Weight) -> bool:
    """Say whether each row of a native tensor belongs to another expert."""
    return weight.dims[0] == "experts"


def fingerprints(weights: Weights, found: Mapping[NativeName, Sequence[str]]) -> dict[str, str]:
    """Bring digests of a model's weights together.

    weights: their descriptions. found: of each weight, as `digests` gives them. Returns them under `model`,
    `embedding`, `norm`, `head`, `layer 0` (attention, norms, dense parts) and `layer 0 expert 3`.
    """
    groups: dict[tuple[int, int, str], list[str]] = defaultdict(list)  # in order: what is in no layer has none below 0
    for native, parts in found.items():
        if native.layer is None:
            groups[-1, -1, native.weight[0]] += parts
            continue
        within = ".".join(native.weight[2:])
        for row, digest in enumerate(parts):
            expert = row if has_rows(weights[native]) else native.expert
            name = f"layer {native.layer}" + ("" if expert is None else f" expert {expert}")
            groups[native.layer, -1 if expert is None else expert, name].append(f"{within} {digest}")
    named = {name: _hex("\n".join(sorted(groups[order, expert, name]))) for order, expert, name in sorted(groups)}
    return {"model": _hex("\n".join(sorted(f"{name} {digest}" for name, digest in named.items()))), **named}


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Digest:
    """Hashes the upper and the lower halves of float32 apart; the lower ones count only where they are not all zero."""

    def __init__(self, shape: Iterable[int]) -> None:
        self._upper, self._lower, self._any_lower = hashlib.sha256(str(list(shape)).encode()), hashlib.sha256(), False

    def update(self, values: Tensor) -> Digest:
        """Take what comes next, in order, in parts of any size."""
        flat = values.reshape(-1)
        for begin in range(0, len(flat), BLOCK):
            self._update(flat[begin : begin + BLOCK])
        return self

    def _update(self, block: Tensor) -> None:
        if block.dtype == torch.bfloat16:
            self._upper.update(block.view(torch.uint8).numpy())  # type: ignore[arg-type]
            return
        halves = block.float().numpy().view(np.uint16).reshape(-1, 2)
        self._upper.update(halves[:, 1].tobytes())
        lower = halves[:, 0].tobytes()
        self._lower.update(lower)
        self._any_lower = self._any_lower or lower.count(0) < len(lower)
        if block.dtype == torch.float64 and bool((rest := block - block.float()).any()):
            self._any_lower = True
            self._lower.update(rest.numpy().tobytes())

    def hex(self) -> str:
        if self._any_lower:
            self._upper.update(self._lower.digest())
            self._any_lower = False
        return self._upper.hexdigest()
