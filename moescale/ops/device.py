"""What the device of a tensor can run."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None
CAPABILITIES: Mapping[str, bool | int | str] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch knows none
HAS_BFLOAT16 = any(CAPABILITIES.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))  # this processor
SHARED_BYTES = 227 * 1024  # of an H100: what kernels are made for where there is no GPU to ask
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h of glibc
MOST_OF_HEAP = 32 << 20  # bytes of the largest tensor that glibc takes from its heap at all
ZEN_5 = 26  # the family of its processors
FLOAT32_ERROR = 1e-6  # of a product, relative by norm; with factors in bfloat16 it is 2e-3


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


def prepare_processor() -> None:
    """Set this process up to train on a processor: its memory, and who multiplies in float32."""
    _keep_freed_memory()
    if _is_recent_amd():
        _multiply_by_onednn()


def _keep_freed_memory() -> None:
    """Let this process keep the memory of tensors that are gone, for those of the next step.

    glibc hands the end of its heap back whenever enough of it is free, and a step whose tensors lie there meets zeroed
    pages again: a third of its time in bfloat16. Memory stays at its peak instead. Other C libraries are left alone.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(MMAP_THRESHOLD, MOST_OF_HEAP)
        library.mallopt(TRIM_THRESHOLD, -1)  # never


def _multiply_by_onednn() -> None:
    """Let oneDNN compute float32 products where MKL, which torch asks, would use half of this processor's width.

    torch calls that a medium precision, since oneDNN may then round factors to bfloat16. It does so where a processor
    has tiles (AMX) and nowhere else: where a product is not that of float32, MKL keeps them.
    """
    torch.set_float32_matmul_precision("medium")
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    exact = a.double() @ b.double()
    if float((a @ b - exact).norm() / exact.norm()) > FLOAT32_ERROR:
        torch.set_float32_matmul_precision("highest")


def _is_recent_amd() -> bool:
    """Say whether this is an AMD processor that multiplies 512 bits at once, as of Zen 5, and has no tiles."""
    try:
        lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    except OSError:
        return False
    said = {key.strip(): value.strip() for key, value in lines}
    recent = said.get("vendor_id") == "AuthenticAMD" and int(said.get("cpu family", "0")) >= ZEN_5
    return recent and bool(CAPABILITIES.get("avx512_f")) and not CAPABILITIES.get("amx_bf16")
