"""The views of one world. The only place of the package, beside the command line, that reads the environment."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moescale.config import Config, ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """Who this rank is, and the views of the world; both views are None on one process.

    dense: axes (pp, dp_replicate, fsdp, tp), of weights that all tokens use. fsdp = dp_shard x cp.
    sparse: axes (pp, dp_replicate, efsdp, ep), of experts. efsdp x ep = fsdp x tp.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    parallel: ParallelConfig
    dense: DeviceMesh | None
    sparse: DeviceMesh | None

    @property
    def batch_size(self) -> int:
        """How many ranks share out the global batch."""
        return self.parallel.dp_replicate * self.parallel.dp_shard

    @property
    def batch_rank(self) -> int:
        """This rank's place among them."""
        if self.dense is None:
            return 0
        return self.dense.get_local_rank("dp_replicate") * self.parallel.dp_shard + self.dense.get_local_rank("fsdp")

    @property
    def batch_group(self) -> dist.ProcessGroup | None:
        """The ranks over which losses and counts are added up; None on one process."""
        return None if self.dense is None else dist.group.WORLD


def world_size() -> int:
    """How many ranks were started, by torchrun or anything that sets WORLD_SIZE; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_rank() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return os.environ.get("RANK", "0") == "0"


def start_mesh(config: Config) -> Mesh:
    """Join the other ranks and lay out the views. config: settled by `Config.for_world`."""
    size, local_rank, parallel = world_size(), int(os.environ.get("LOCAL_RANK", "0")), config.parallel
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with_parent()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        return Mesh(0, local_rank, 1, device, parallel, None, None)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=config.run.timeout_seconds))
    fsdp = parallel.dp_shard * parallel.cp
    efsdp = fsdp * parallel.tp // parallel.ep
    dense_names, sparse_names = ("pp", "dp_replicate", "fsdp", "tp"), ("pp", "dp_replicate", "efsdp", "ep")
    outer = (parallel.pp, parallel.dp_replicate)
    dense = init_device_mesh(device.type, (*outer, fsdp, parallel.tp), mesh_dim_names=dense_names)
    sparse = init_device_mesh(device.type, (*outer, efsdp, parallel.ep), mesh_dim_names=sparse_names)
    return Mesh(dist.get_rank(), local_rank, size, device, parallel, dense, sparse)


def _die_with_parent() -> None:
    """End with torchrun when it is killed: ranks that live on would write beside the run that takes over."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def stop_mesh() -> None:
    """Leave the world."""
    if dist.is_initialized():
        dist.destroy_process_group()
