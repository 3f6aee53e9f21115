"""How the model is spread, on one page. Nothing above this folder knows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.distributed.device_mesh import DeviceMesh

from moescale.comm.placement import Attachable, Placement
from moescale.comm.sequence_shards import SharedSequenceShards
from moescale.config import Config, sequence_pieces
from moescale.model.build import build_model
from moescale.model.initialize import initialize
from moescale.model.language_model import LanguageModel
from moescale.moe.layer import MoELayer
from moescale.parallel.context import ContextAttention, deal_pieces
from moescale.parallel.cut import spread_experts, spread_matrices
from moescale.parallel.expert import place_experts
from moescale.parallel.fsdp import shard_parameters
from moescale.parallel.mesh import Mesh, take_share
from moescale.planner.stages import cut_into_stages
from moescale.spec.model import describe


@dataclass(frozen=True)
class ParallelModel:
    """What lies on this rank. pieces: to run, one or, in some pipelines, two. whole: all of them, by their names."""

    pieces: list[LanguageModel]
    whole: LanguageModel


def build_parallel_model(config: Config, mesh: Mesh, *, fsdp: bool = True) -> ParallelModel:
    """Build this rank's part of the model, filled with its first values: on meta, then cut, then in memory.

    fsdp: whether ranks that see other tokens share each weight; otherwise each has it whole.
    """
    model = build_model(config, "meta")
    pieces = [model]
    if mesh.parallel.pp > 1:
        from moescale.parallel.pipeline import join, take_stages  # only now: its import takes a while

        pieces = take_stages(model, cut_into_stages(config), mesh.stages)
        model = join(pieces)
    parallelize(model, pieces, config, mesh, fsdp=fsdp)
    model.to_empty(device=mesh.device)
    for buffer in model.buffers():
        buffer.zero_()  # counts and biases
    initialize(model, describe(config), config.run.seed)
    return ParallelModel(pieces, model)


def parallelize(
    model: LanguageModel, pieces: list[LanguageModel], config: Config, mesh: Mesh, *, fsdp: bool = True
) -> None:
    """Cut the model over the ranks: tensor, experts, context, recompute, compile, data.

    model: all of this rank's pieces under one name. fsdp: as in `build_parallel_model`.
    """
    parallel, spec = mesh.parallel, describe(config)
    if parallel.tp > 1 and mesh.dense is not None:
        spread_matrices(model, spec, mesh.dense["tp"])
    if parallel.ep * parallel.etp > 1 and mesh.sparse is not None:
        spread_experts(model, spec, mesh.sparse["ep", "etp"])
    attach([model, *pieces], make_placement(config, mesh))
    if fsdp and mesh.dense is not None and mesh.sparse is not None:
        shared = (mesh.dense, "fsdp") if mesh.shared is None else (mesh.shared, "fsdp_tp")
        shard_parameters(pieces, spec, _data_axes(mesh.dense, "fsdp"), _data_axes(*shared),
                         _data_axes(mesh.sparse, "efsdp"), rounded=config.precision.reduce == "bfloat16")


def attach(models: list[LanguageModel], placement: Placement) -> None:
    """Tell every module that takes part, once, where its part of the model lies."""
    modules = dict.fromkeys(module for model in models for module in model.modules())
    number = 0
    for module in modules:
        if isinstance(module, MoELayer):
            module.attach(replace(placement, label=f"MoE layer {number}"))
            number += 1
        elif isinstance(module, Attachable):
            module.attach(placement)


def make_placement(config: Config, mesh: Mesh) -> Placement:
    """Say where this rank's part of the model lies, and how it runs there."""
    parallel = mesh.parallel
    placement = Placement(experts=place_experts(mesh), recompute=parallel.recompute, compiled=parallel.compile)
    if mesh.sequence_size == 1:
        return placement
    assert mesh.data is not None
    assert mesh.sequence is not None
    cp, tp = mesh.data["cp"], take_share(mesh.data["tp"])
    pieces = deal_pieces(cp.size(), sequence_pieces(cp.size(), config.longest_window))
    sequence = SharedSequenceShards(
        pieces, cp.get_local_rank(), tp.rank, tp.size, tp_group=tp.group, cp_group=cp.get_group(),
        group=mesh.sequence["cp_tp"].get_group(), compiled=parallel.compile,
    )
    core = ContextAttention(pieces, cp.get_local_rank(), cp.get_group()) if cp.size() > 1 else None
    return replace(placement, sequence=sequence, tp=tp, attention_core=core)


def _data_axes(view: DeviceMesh, shard_axis: str) -> DeviceMesh:
    """The axes over which gradients are added up; replicas only where there are any."""
    return view["dp_replicate", shard_axis] if view["dp_replicate"].size() > 1 else view[shard_axis]
