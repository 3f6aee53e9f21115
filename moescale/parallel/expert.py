"""Expert parallelism: a layer's experts are cut over the ranks of `ep`, each over those of `etp`; tokens travel."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from moescale.comm.placement import ExpertPlacement, HopPlan, RowCeiling
from moescale.moe.layer import MoELayer
from moescale.parallel.mesh import Mesh, node_ranks, take_share


def place_experts(mesh: Mesh) -> ExpertPlacement:
    """Say where experts lie, how tokens travel there, and how many rows a rank takes at a time."""
    parallel, group, ceiling = mesh.parallel, mesh.expert_group, None
    if parallel.row_budget is not None:
        axes = [] if mesh.sparse is None else [mesh.sparse["dp_replicate"], mesh.sparse["efsdp"]]
        replica_groups = tuple(axis.get_group() for axis in axes if axis.size() > 1)
        ceiling = RowCeiling(parallel.row_budget, parallel.over_budget == "drop", replica_groups)
    if mesh.sparse is None or parallel.ep * parallel.etp == 1:
        return ExpertPlacement(group=group, ceiling=ceiling)
    return ExpertPlacement(
        take_share(mesh.sparse["ep"]), take_share(mesh.sparse["etp"]), group, DISPATCHERS[parallel.dispatcher](mesh),
        parallel.dispatch_chunks, _away(mesh), ceiling,
    )


def _away(mesh: Mesh) -> tuple[tuple[bool, bool], ...]:
    """Say per rank of ep whether a token of this rank must travel to another rank for its experts, and node."""
    ranks, node = dist.get_process_group_ranks(mesh.expert_group), mesh.parallel.node_ranks or node_ranks()
    etp = mesh.parallel.etp
    homes = [ranks[owner * etp : (owner + 1) * etp] for owner in range(mesh.parallel.ep)]
    return tuple((any(rank != mesh.rank for rank in home), any(rank // node != mesh.rank // node for rank in home))
                 for home in homes)


def _all_to_all(mesh: Mesh) -> tuple[HopPlan, ...]:
    return (HopPlan(mesh.expert_group, mesh.parallel.etp),)


def _hierarchical(mesh: Mesh) -> tuple[HopPlan, ...]:
    if mesh.nodes is None:  # all of them are on one node
        return _all_to_all(mesh)
    among, within = mesh.nodes["ep_nodes"].get_group(), mesh.nodes["ep_node"].get_group()
    return (HopPlan(among, where=", among nodes"), HopPlan(within, mesh.parallel.etp, where=", within the node"))


def _all_gather(mesh: Mesh) -> tuple[HopPlan, ...]:
    return (HopPlan(mesh.expert_group, mesh.parallel.etp, to_all=True),)


DISPATCHERS = {"all_to_all": _all_to_all, "hierarchical": _hierarchical, "all_gather": _all_gather}


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The model's MoE layers, in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]
