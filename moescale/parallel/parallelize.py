"""How the model is spread, on one page. Nothing above this folder knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from moescale.comm.sequence_shards import SharedSequence
from moescale.config import Config, sequence_pieces
from moescale.mixers.attention import Attention
from moescale.model.block import Block
from moescale.model.build import build_model
from moescale.model.initialize import initialize
from moescale.model.language_model import LanguageModel
from moescale.moe.layer import MoELayer
from moescale.parallel.context import ContextAttention, deal_pieces
from moescale.parallel.expert import limit_rows, spread_experts
from moescale.parallel.fsdp import shard_parameters
from moescale.parallel.mesh import Mesh
from moescale.parallel.recompute import recompute
from moescale.parallel.tensor import spread_losses, spread_matrices
from moescale.planner.stages import cut_into_stages
from moescale.spec.model import describe


@dataclass(frozen=True)
class ParallelModel:
    """What lies on this rank. pieces: to run, one or, in some pipelines, two. whole: all of them, by their names."""

    pieces: list[LanguageModel]
    whole: LanguageModel


def build_parallel_model(config: Config, mesh: Mesh) -> ParallelModel:
    """Build this rank's part of the model, filled with its first values: on meta, then cut, then in memory."""
    model = build_model(config, "meta")
    pieces = [model]
    if mesh.parallel.pp > 1:
        from moescale.parallel.pipeline import join, take_stages  # only now: its import takes a while

        pieces = take_stages(model, cut_into_stages(config), mesh.stages)
        model = join(pieces)
    parallelize(model, pieces, config, mesh)
    model.to_empty(device=mesh.device)
    for buffer in model.buffers():
        buffer.zero_()  # counts and biases
    initialize(model, describe(config), config.run.seed)
    return ParallelModel(pieces, model)


def parallelize(model: LanguageModel, pieces: list[LanguageModel], config: Config, mesh: Mesh) -> None:
    """Cut the model over the ranks: tensor, experts, context, recompute, compile, data.

    model: all of this rank's pieces under one name.
    """
    parallel = mesh.parallel
    if parallel.tp > 1 and mesh.dense is not None:
        spread_matrices(model, mesh.dense["tp"])
        for piece in pieces:
            spread_losses(piece, mesh.dense["tp"])
    if parallel.ep * parallel.etp > 1 and mesh.sparse is not None:
        spread_experts(model, mesh)
    limit_rows(model, mesh)
    if mesh.sequence_size > 1:
        share_sequences([model, *pieces], config, mesh)
    if parallel.recompute != "none":
        recompute(model, parallel.recompute)
    if parallel.compile:
        compile_blocks(model)
    if mesh.dense is not None and mesh.sparse is not None:
        shared = (mesh.dense, "fsdp") if mesh.shared is None else (mesh.shared, "fsdp_tp")
        shard_parameters(pieces, describe(config), _data_axes(mesh.dense, "fsdp"), _data_axes(*shared),
                         _data_axes(mesh.sparse, "efsdp"))


def compile_blocks(model: LanguageModel) -> None:
    """Compile each block, but for what looks at numbers on the host or sends them: mixtures and attention's tiles."""
    for sequence in {id(block.sequence): block.sequence for block in model.blocks.values()}.values():
        sequence.widen = torch.compiler.disable(sequence.widen)  # type: ignore[union-attr]
        sequence.narrow = torch.compiler.disable(sequence.narrow)  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        elif isinstance(module, Attention):
            module.attend = torch.compiler.disable(module.attend)
        elif isinstance(module, Block):
            module.compile()


def share_sequences(models: list[LanguageModel], config: Config, mesh: Mesh) -> None:
    """Tell every module that asks where positions lie, and let attention look across ranks."""
    assert mesh.data is not None
    assert mesh.sequence is not None
    cp, tp = mesh.data["cp"], mesh.data["tp"]
    pieces = deal_pieces(cp.size(), sequence_pieces(cp.size(), config.longest_window))
    sequence = SharedSequence(
        pieces, cp.get_local_rank(), tp.get_local_rank(), tp.size(), tp_group=tp.get_group(),
        group=mesh.sequence["cp_tp"].get_group(),
    )
    for model in models:
        for module in model.modules():
            if hasattr(module, "sequence"):
                module.sequence = sequence  # type: ignore[assignment]
            if isinstance(module, Attention) and cp.size() > 1:
                module.attend = ContextAttention(pieces, cp.get_local_rank(), cp.get_group())


def _data_axes(view: DeviceMesh, shard_axis: str) -> DeviceMesh:
    """The axes over which gradients are added up; replicas only where there are any."""
    return view["dp_replicate", shard_axis] if view["dp_replicate"].size() > 1 else view[shard_axis]
