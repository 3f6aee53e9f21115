"""Fingerprints: two checkpoints hold the same model if theirs are equal, whatever format, layout and dtype they are in.

A weight counts by its value: bfloat16 and the float32 it widens to are the same. An expert is its matrices and its row
of the router, so that experts that change places take their fingerprints with them.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 20  # elements taken at a time
PLACE = re.compile(r"blocks\.(\d+)\.(.+?)(?:\.(\d+))?")
ROWS = (".router.weight", ".router.expert_bias")  # a row an expert


def digests(name: str, values: Tensor) -> dict[str, str]:
    """Hash a native tensor, row by row where each row is an expert's: by name, with the row's number behind it."""
    if has_rows(name):
        return {f"{name}.{index}": Digest(row.shape).update(row).hex() for index, row in enumerate(values)}
    return {name: Digest(values.shape).update(values).hex()}


def has_rows(name: str) -> bool:
    """Say whether each row of a native tensor belongs to another expert."""
    return name.endswith(ROWS)


def fingerprints(parts: Mapping[str, str]) -> dict[str, str]:
    """Bring digests of a model's weights together.

    Returns those of `model`, `embedding`, `norm`, `head`, `layer 0` (attention, norms, dense parts) and
    `layer 0 expert 3`.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name, digest in parts.items():
        place = PLACE.fullmatch(name)
        if place is None:
            groups[name.split(".")[0]].append(digest)
        elif place[3] is None:
            groups[f"layer {place[1]}"].append(f"{place[2]} {digest}")
        else:
            groups[f"layer {place[1]} expert {place[3]}"].append(f"{place[2]} {digest}")
    found = {group: _hex("\n".join(sorted(groups[group]))) for group in sorted(groups, key=_in_order)}
    return {"model": _hex("\n".join(sorted(f"{group} {digest}" for group, digest in found.items()))), **found}


def _in_order(group: str) -> tuple[bool, list[int], str]:
    """What is not in a layer first, then layers and experts by their numbers: 10 comes after 2."""
    return group.startswith("layer"), [int(word) for word in group.split() if word.isdigit()], group


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
