"""The views of one world."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moescale.cluster.launch import read_launch
from moescale.comm.placement import Share
from moescale.config import Config, ConfigError, ParallelConfig
from moescale.ops.device import prepare_processor


@dataclass(frozen=True)
class Mesh:
    """Who this rank is, and the views of the world; all views are None on one process.

    Ranks are numbered with tp innermost: (pp, dp_replicate, dp_shard, cp, tp). fsdp = dp_shard x cp.
    dense: axes (pp, dp_replicate, fsdp, tp), of matrices that tensor parallelism cuts.
    shared: axes (pp, dp_replicate, fsdp_tp), of weights that meet each token on one rank alone, such as norms.
    sparse: axes (pp, dp_replicate, efsdp, ep, etp), of experts. efsdp x ep x etp = fsdp x tp.
    expert: axes (..., ep_etp), the ranks among which tokens travel; the same as ep unless etp is used.
    nodes: axes (..., ep_nodes, ep_node), the same ranks by node; where tokens travel among the nodes first.
    data: axes (pp_batch, cp, tp), of tokens. sequence: axes (outer, cp_tp), the ranks that share a sequence.
    checkpoint_group: all ranks, with the time-out of a checkpoint; memory_group: likewise, for copies in memory alone,
    where there are any.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    parallel: ParallelConfig
    dense: DeviceMesh | None = None
    shared: DeviceMesh | None = None
    sparse: DeviceMesh | None = None
    expert: DeviceMesh | None = None
    nodes: DeviceMesh | None = None
    data: DeviceMesh | None = None
    sequence: DeviceMesh | None = None
    checkpoint_group: dist.ProcessGroup | None = None
    memory_group: dist.ProcessGroup | None = None

    @property
    def batch_size(self) -> int:
        """How many ranks share out the global batch."""
        return self.parallel.dp_replicate * self.parallel.dp_shard

    @property
    def batch_rank(self) -> int:
        """This rank's place among them."""
        return self.rank // self.sequence_size % self.batch_size

    @property
    def sequence_size(self) -> int:
        """How many ranks share each sequence; neighbours in the numbering."""
        return self.parallel.cp * self.parallel.tp

    @property
    def batch_copies(self) -> int:
        """How many ranks read the same batch: those that share its sequences or its layers."""
        return self.world_size // self.batch_size

    @property
    def stages(self) -> tuple[int, ...]:
        """The pieces of the model that lie here: one of pp, or two where the schedule interleaves."""
        pp = self.parallel.pp
        return tuple(range(self.rank // (self.world_size // pp), self.parallel.pp_stages, pp))

    @property
    def expert_group(self) -> dist.ProcessGroup | None:
        """The ranks among which tokens travel to their experts."""
        if self.sparse is None:
            return None
        return self.sparse["ep"].get_group() if self.expert is None else self.expert["ep_etp"].get_group()

    @property
    def world_group(self) -> dist.ProcessGroup | None:
        """The ranks over which losses and counts are added up; None on one process."""
        return None if self.dense is None else dist.group.WORLD


def take_share(axis: DeviceMesh) -> Share:
    """Say which share of what this axis cuts lies here."""
    return Share(axis.get_local_rank(), axis.size(), axis.get_group() if axis.size() > 1 else None)


def world_size() -> int:
    """How many ranks were started, by torchrun or anything that sets WORLD_SIZE; one without it."""
    return read_launch().size


def node_ranks() -> int:
    """How many ranks were started on this node."""
    return read_launch().node_ranks


def start_mesh(config: Config, store: dist.Store | None = None) -> Mesh:
    """Join the other ranks and lay out the views. config: settled by `Config.for_world`.

    store: where the ranks find each other; None = at MASTER_ADDR and MASTER_PORT.
    """
    launch, parallel = read_launch(), config.parallel
    size, local_rank = launch.size, launch.local_rank
    cuda = torch.cuda.is_available()
    if cuda and launch.device >= torch.cuda.device_count():
        raise ConfigError(f"LOCAL_RANK={local_rank}, but this node shows {torch.cuda.device_count()} GPUs: start one "
                          "rank a GPU, e.g. with torchrun --nproc-per-node gpu")
    device = torch.device("cuda", launch.device) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        prepare_processor()
    if size == 1:
        return Mesh(0, local_rank, 1, device, parallel)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=timedelta(seconds=config.run.timeout_seconds),
            store=store, rank=-1 if store is None else launch.rank, world_size=-1 if store is None else size,
        )
    saving, copying = (
        dist.new_group(backend="gloo", timeout=timedelta(seconds=config.checkpoint.timeout_seconds)) if used else None
        for used in (True, config.checkpoint.in_memory is not None))
    fsdp, outer = parallel.dp_shard * parallel.cp, (parallel.pp, parallel.dp_replicate)
    sharing = fsdp * parallel.tp
    views: dict[str, dict[str, int]] = {
        "dense": {"fsdp": fsdp, "tp": parallel.tp},
        "sparse": {"efsdp": sharing // (parallel.ep * parallel.etp), "ep": parallel.ep, "etp": parallel.etp},
    }
    if parallel.tp > 1:
        views["shared"] = {"fsdp_tp": sharing}
    node, ranks = parallel.node_ranks, parallel.ep * parallel.etp
    if parallel.etp > 1:
        views["expert"] = {"efsdp": sharing // ranks, "ep_etp": ranks}
    if parallel.dispatcher == "hierarchical" and node is not None and ranks > node:
        views["nodes"] = {"efsdp": sharing // ranks, "ep_nodes": ranks // node, "ep_node": node}
    made = {
        name: init_device_mesh(device.type, (*outer, *axes.values()), mesh_dim_names=("pp", "dp_replicate", *axes))
        for name, axes in views.items()
    }
    if parallel.cp * parallel.tp > 1:  # a sequence lies on several ranks
        pieces = parallel.cp * parallel.tp
        made["data"] = init_device_mesh(device.type, (size // pieces, parallel.cp, parallel.tp),
                                        mesh_dim_names=("pp_batch", "cp", "tp"))
        made["sequence"] = init_device_mesh(device.type, (size // pieces, pieces), mesh_dim_names=("outer", "cp_tp"))
    return Mesh(dist.get_rank(), local_rank, size, device, parallel, checkpoint_group=saving, memory_group=copying,
                **made)


def stop_mesh() -> None:
    """Leave the world."""
    if dist.is_initialized():
        dist.destroy_process_group()
