"""What the device of a tensor can run."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None
CAPABILITIES: Mapping[str, bool | int | str] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch knows none
HAS_BFLOAT16 = any(CAPABILITIES.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))  # this processor
SHARED_BYTES = 227 * 1024  # of an H100: what kernels are made for where there is no GPU to ask
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h of glibc
MOST_OF_HEAP = 32 << 20  # bytes of the largest tensor that glibc takes from its heap at all


def triton_runs(x: Tensor) -> bool:
    """Say whether Triton kernels take this tensor: on a GPU, with Triton installed, and not in float64."""
    return TRITON and x.device.type == "cuda" and x.dtype != torch.float64


def shared_bytes(x: Tensor) -> int:
    """Look up the shared memory of one block, in bytes: 227 KB on an H100, 163 on an A100, 99 on a desktop's GPU."""
    if x.device.type == "cuda":
        device = torch.cuda.get_device_properties(x.device)
        return int(getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block))
    return SHARED_BYTES


def is_hopper(x: Tensor) -> bool:
    """Say whether x is on a GPU of the Hopper generation."""
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) == (9, 0)


def keep_freed_memory() -> None:
    """Let this process keep the memory of tensors that are gone, for those of the next step.

    glibc hands the end of its heap back whenever enough of it is free, and a step whose tensors lie there meets zeroed
    pages again: a third of its time in bfloat16. Memory stays at its peak instead. Other C libraries are left alone.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(MMAP_THRESHOLD, MOST_OF_HEAP)
        library.mallopt(TRIM_THRESHOLD, -1)  # never
