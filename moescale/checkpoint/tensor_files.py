"""The files that hold tensors: written and read by torch's distributed checkpoint, known by size and CRC-32."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from moescale.checkpoint.together import Ranks

# Torch warns whenever one process saves or loads, which here is what the user asked for.
warnings.filterwarnings("ignore", r"torch\.distributed is (disabled, )?unavailable or uninitialized", UserWarning)


class Writer(FileSystemWriter):
    """Torch's writer, but a full disk is told as such.

    Torch reports a position in the file instead, and the cause of an error is lost on its way to the other ranks.
    """

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from None


def write_tensors(folder: Path, tensors: dict[str, Tensor], ranks: Ranks, *, synced: bool = True) -> None:
    """Write this rank's tensors into a file of its own, and the index of all as rank 0. synced: onto the disk"""
    writer = Writer(folder, single_file_per_rank=True, sync_files=synced)
    dcp.save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=ranks.alone)


def read_tensors(reader: FileSystemReader, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill this rank's tensors from the files of any ranks."""
    dcp.load(tensors, storage_reader=reader, process_group=ranks.group, no_dist=ranks.alone)


def check_sums(folder: Path, pattern: str) -> dict[str, list[int]]:
    """Find the size in bytes and the CRC-32 of each file."""
    sums = {}
    for path in folder.glob(pattern):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                crc = zlib.crc32(block, crc)
        sums[path.name] = [path.stat().st_size, crc]
    return sums


def unlike(file: Path, size: int, crc: int | None) -> str | None:
    """Say how a file differs from what its writer says, if it does. crc: None = not looked at"""
    try:
        found = file.stat().st_size
        if found != size:
            return f"has {found} of {size} bytes"
        return None if crc is None or check_sums(file.parent, file.name)[file.name][1] == crc else "has other bytes"
    except (OSError, KeyError):
        return "is missing"


def not_finite(tensors: Mapping[str, Tensor], ranks: Ranks) -> str | None:
    """Name a tensor that holds what is no finite number on some rank, the same on all; None if there is none."""
    parts = {name: getattr(tensor, "_local_tensor", tensor).detach() for name, tensor in tensors.items()
             if tensor.is_floating_point()}
    sums = [_sum(part) for part in parts.values()]
    finite = torch.stack(sums).isfinite().tolist() if sums else []
    # finite numbers may have too large a sum, so then each is looked at
    found = next((name for (name, part), good in zip(parts.items(), finite, strict=True)
                if not good and not bool(part.isfinite().all())), None)
    return next((name for name in ranks.gather(found) if name is not None), None)


def _sum(values: Tensor) -> Tensor:
    """Add up all values, faster than looking at each: scalar float64, no finite number if one of them is none."""
    values = values.float() if values.dtype.itemsize == 1 else values  # of float8, which knows no sum
    return values.sum(dtype=torch.float64 if values.dtype == torch.float64 else torch.float32).double()
