"""What tensor descriptors, through which kernels load by TMA, require of tensors on the host."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

BYTES = 16  # rows begin at multiples of it, and so do strides


def allow_descriptors() -> None:
    """Let kernels make descriptors, in memory of the device. Call it before each launch: it holds per thread."""
    triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def padded(x: Tensor, dims: int = 1) -> Tensor:
    """Pad each of the last `dims` dims with zeros up to a multiple of 16 bytes. -> x itself when nothing is missing"""
    missing = [(0, -size % (BYTES // x.element_size())) for size in reversed(x.shape[-dims:])]
    return F.pad(x, sum(missing, ())) if any(behind for _, behind in missing) else x


def unpadded(x: Tensor, size: int) -> Tensor:
    """Cut the last dim to `size`. -> x itself when that is all of it, since the gradient of a slice is a copy"""
    return x if x.shape[-1] == size else x[..., :size]


def fits(x: Tensor) -> bool:
    """Say whether a descriptor can describe x: aligned, contiguous rows, with strides of whole 16 bytes."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.stride(-1) == 1 and x.data_ptr() % BYTES == 0 and all(step > 0 and step % BYTES == 0 for step in steps)


def fitting(x: Tensor) -> Tensor:
    """Copy x when a descriptor cannot describe it. Its last dim must be a multiple of 16 bytes. -> like x"""
    return x if fits(x) else x.clone(memory_format=torch.contiguous_format)


def is_whole(x: Tensor) -> bool:
    """Say whether kernels, which know the sizes of x and not its strides, can describe it and find its numbers."""
    return x.is_contiguous() and fits(x)


def whole(x: Tensor) -> Tensor:
    """Copy x where they cannot. Its last dim must be a multiple of 16 bytes. -> like x"""
    return fitting(x.contiguous())
