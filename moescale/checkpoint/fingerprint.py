"""Fingerprints: two checkpoints hold the same model if theirs are equal, whatever format, layout and dtype they are in.

A weight counts by its value: bfloat16 and the float32 it widens to are the same. An expert is its matrices and its row
of the router, so that experts that change places take their fingerprints with them.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 20  # elements taken at a time
PLACE = re.compile(r"blocks\.(\d+)\.(.+?)(?:\.(\d+))?")
ROWS = (".router.weight", ".router.expert_bias")  # a row an expert


def digests(name: str, values: Tensor) -> dict[str, str]:
    """Hash a native tensor, row by row where each row is an expert's. -> by name, with the row's number behind it"""
    if name.endswith(ROWS):
        return {f"{name}.{index}": _digest(row) for index, row in enumerate(values)}
    return {name: _digest(values)}


def fingerprints(parts: Mapping[str, str]) -> dict[str, str]:
    """Bring digests of a model's weights together.

    -> `model`, `embedding`, `norm`, `head`, `layer 0` (attention, norms, dense parts), `layer 0 expert 3`
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


def _digest(values: Tensor) -> str:
    """Hash the upper and the lower halves of float32 apart; the lower ones count only where they are not all zero."""
    upper, lower, any_lower = hashlib.sha256(str(list(values.shape)).encode()), hashlib.sha256(), False
    flat = values.reshape(-1)
    for begin in range(0, len(flat), BLOCK):
        block = flat[begin : begin + BLOCK]
        if block.dtype == torch.bfloat16:
            upper.update(block.view(torch.uint8).numpy().tobytes())
            lower.update(bytes(block.numel() * 2))
            continue
        halves = block.float().numpy().view(np.uint16).reshape(-1, 2)
        upper.update(halves[:, 1].tobytes())
        lower.update(halves[:, 0].tobytes())
        any_lower = any_lower or bool(halves[:, 0].any())
        rest = block - block.float() if block.dtype == torch.float64 else None
        if rest is not None and bool(rest.any()):
            any_lower = True
            lower.update(rest.numpy().tobytes())
    if any_lower:
        upper.update(lower.digest())
    return upper.hexdigest()
