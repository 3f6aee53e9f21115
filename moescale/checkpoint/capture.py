"""What a checkpoint is made of, held still while training goes on: a copy in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moescale.checkpoint.store import save_checkpoint


@dataclass(frozen=True)
class Capture:
    """One moment of a run on this rank.

    tensors: by name, sharded ones as DTensors. state: small values for the manifest. files: small ones, by name.
    """

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    files: Mapping[str, str | bytes]

    def write(self, run_dir: Path, keep: int, group: dist.ProcessGroup | None) -> Path:
        """Write a checkpoint to the run directory, all ranks together, as `save_checkpoint` says."""
        return save_checkpoint(run_dir, self.step, dict(self.tensors), dict(self.state), self.files, keep=keep,
                               group=group)


class HostCopy:
    """Host memory that holds one copy of this rank's tensors; it is made once and filled again for each copy."""

    def __init__(self) -> None:
        self._parts: dict[str, Tensor] = {}

    def fill(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors; what is returned equals them, and holds until the next call.

        The parts of DTensors become the parts of others that are cut likewise. Returns when all bytes have arrived.
        """
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            part = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            kept = self._parts.get(name)
            if kept is None or kept.shape != part.shape or kept.dtype != part.dtype:
                kept = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
                self._parts[name] = kept
            kept.copy_(part, non_blocking=True)
            copies[name] = DTensor(kept, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else kept
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return copies
