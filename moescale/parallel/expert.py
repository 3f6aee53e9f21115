"""Expert parallelism: a layer's experts are cut over the ranks of `ep`, each over those of `etp`; tokens travel."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from moescale.moe.budget import RowBudget
from moescale.moe.dispatchers import Dispatcher
from moescale.moe.hops import Hop
from moescale.moe.layer import MoELayer
from moescale.parallel.mesh import Mesh, node_ranks

HIDDEN = {"gate": 1, "up": 1, "down": 2}  # the dim of the hidden features, which `etp` cuts


def spread_experts(model: nn.Module, mesh: Mesh) -> None:
    """Keep this rank's experts, or its share of them, as DTensors, and let tokens travel to the others."""
    assert mesh.sparse is not None
    ranks, etp = mesh.sparse["ep", "etp"], mesh.parallel.etp
    for number, layer in enumerate(moe_layers(model)):
        experts = layer.experts
        experts.first = (experts.num_experts // mesh.parallel.ep * ranks.get_local_rank("ep"),
                         experts.d_ff // etp * ranks.get_local_rank("etp"))
        for name, weight in experts.named_parameters():
            part = distribute_tensor(weight.data, ranks, [Shard(0), Shard(HIDDEN[name])], src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(part))
        layer.dispatcher = Dispatcher(DISPATCHERS[mesh.parallel.dispatcher](mesh, f"MoE layer {number}"))
        layer.chunks = mesh.parallel.dispatch_chunks
        layer.statistics.elsewhere = _elsewhere(experts.num_experts, mesh)


def _elsewhere(num_experts: int, mesh: Mesh) -> list[tuple[bool, bool]]:
    """Say of each expert whether a token of this rank must travel to another rank for it, and to another node."""
    ranks, node = dist.get_process_group_ranks(mesh.expert_group), mesh.parallel.node_ranks or node_ranks()
    etp, local_experts = mesh.parallel.etp, num_experts // mesh.parallel.ep
    homes = [ranks[owner * etp : (owner + 1) * etp] for owner in range(mesh.parallel.ep)]
    away = [(any(rank != mesh.rank for rank in home), any(rank // node != mesh.rank // node for rank in home))
            for home in homes]
    return [away[expert // local_experts] for expert in range(num_experts)]


def limit_rows(model: nn.Module, mesh: Mesh) -> None:
    """Give each layer's experts the ceiling of rows that the run asks for."""
    parallel = mesh.parallel
    if parallel.row_budget is None:
        return
    axes = [] if mesh.sparse is None else [mesh.sparse["dp_replicate"], mesh.sparse["efsdp"]]
    replica_groups = [axis.get_group() for axis in axes if axis.size() > 1]
    for layer in moe_layers(model):
        layer.budget = RowBudget(parallel.row_budget, layer.router.top_k, parallel.over_budget == "drop",
                                 mesh.expert_group, parallel.etp, replica_groups)


def _all_to_all(mesh: Mesh, label: str) -> list[Hop]:
    return [Hop(mesh.expert_group, etp=mesh.parallel.etp, label=label)]


def _hierarchical(mesh: Mesh, label: str) -> list[Hop]:
    if mesh.nodes is None:  # all of them are on one node
        return _all_to_all(mesh, label)
    among, within = mesh.nodes["ep_nodes"].get_group(), mesh.nodes["ep_node"].get_group()
    return [Hop(among, label=f"{label}, among nodes"),
            Hop(within, etp=mesh.parallel.etp, label=f"{label}, within the node")]


def _all_gather(mesh: Mesh, label: str) -> list[Hop]:
    return [Hop(mesh.expert_group, etp=mesh.parallel.etp, to_all=True, label=label)]


DISPATCHERS = {"all_to_all": _all_to_all, "hierarchical": _hierarchical, "all_gather": _all_gather}


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The model's MoE layers, in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]
