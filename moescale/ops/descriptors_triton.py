"""Tensor descriptors, by which a kernel has the TMA of the device load: what they ask of the host."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

BYTES = 16  # that divide where rows begin, and what lies between them


def allow_descriptors() -> None:
    """Let kernels make descriptors, in memory of the device. To be called before each: threads differ in this."""
    triton.set_allocator(_room)


def _room(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def padded(x: Tensor, dims: int = 1) -> Tensor:
    """-> x, with zeros behind each of its last dims where their bytes are no multiple of 16"""
    missing = [(0, -size % (BYTES // x.element_size())) for size in reversed(x.shape[-dims:])]
    return F.pad(x, sum(missing, ())) if any(behind for _, behind in missing) else x


def unpadded(x: Tensor, size: int) -> Tensor:
    """-> x, with so much of its last dim; itself where that is all, for the gradient of a part is a copy"""
    return x if x.shape[-1] == size else x[..., :size]


def fits(x: Tensor) -> bool:
    """Say whether a descriptor can tell of its rows, which lie along the last dim."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.stride(-1) == 1 and x.data_ptr() % BYTES == 0 and all(step > 0 and step % BYTES == 0 for step in steps)


def fitting(x: Tensor) -> Tensor:
    """-> x or, where a descriptor cannot tell of it, a copy. The bytes of its last dim are a multiple of 16."""
    return x if fits(x) else x.clone(memory_format=torch.contiguous_format)
