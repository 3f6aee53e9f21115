"""Fully sharded data parallelism (FSDP2), also with replicas (HSDP), and the precision of its traffic."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from moescale.mixers.attention import Attention
from moescale.model.block import Block
from moescale.model.language_model import LanguageModel
from moescale.moe.experts import Experts
from moescale.moe.layer import MoELayer


def shard_parameters(
    pieces: Sequence[LanguageModel], dense: DeviceMesh, shared: DeviceMesh, experts: DeviceMesh
) -> None:
    """Cut every weight over the ranks that see other tokens; gradients are added up over them, in float32.

    pieces: of the model, that lie on this rank. dense: the data axes, (fsdp) or (dp_replicate, fsdp), of matrices that
    ranks of tp work with on the same tokens; shared: those of weights that meet each token on one rank, which add the
    ranks of tp; experts: those that hold the same experts.
    """
    # a pipeline's micro-batches take turns, and backward may come in two halves: weights stay gathered during a step
    reshard = all(piece.first and piece.norm is not None for piece in pieces)
    wide = torch.promote_types(pieces[0].compute_dtype, torch.float32)
    narrow = pieces[0].compute_dtype if pieces[0].compute_dtype != wide else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=wide, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(reduce_dtype=wide, cast_forward_inputs=False)  # weights as they are
    tensor_parallel = shared.size() != dense.size()
    alone: set[nn.Parameter] = set()  # experts that no other rank holds: nothing to gather, nothing to add up
    for piece in pieces:
        for block in piece.blocks.values():
            assert isinstance(block, Block)
            if tensor_parallel:
                _shard_shared(block, shared, policy, exact, reshard)
            if isinstance(block.channel_mixer, MoELayer):
                layer = block.channel_mixer
                if not tensor_parallel:
                    fully_shard(layer.router, mesh=shared, mp_policy=exact, reshard_after_forward=reshard)
                if experts.size() == 1:
                    alone.update(layer.experts.parameters())
                else:
                    features = partial(_features_dim, layer.experts)
                    fully_shard(layer.experts, mesh=experts, mp_policy=policy, reshard_after_forward=reshard,
                                shard_placement_fn=features)
            _shard(block, dense, policy, alone, reshard)
        if piece.norm is not None and tensor_parallel:
            fully_shard(piece.norm, mesh=shared, mp_policy=exact, reshard_after_forward=reshard)
        if piece.embedding is not None and piece.head is None and not isinstance(piece.embedding, FSDPModule):
            _shard(piece.embedding, dense, policy, alone, False)  # met twice: as head too
            register_fsdp_forward_method(piece.embedding, "as_head")
        _shard(piece, dense, policy, alone, False)
        for module in piece.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # losses are divided by global counts; gradients are plain sums
                module.set_force_sum_reduction_for_comms(True)


def _shard_shared(
    block: Block, shared: DeviceMesh, policy: MixedPrecisionPolicy, exact: MixedPrecisionPolicy, reshard: bool
) -> None:
    """Set apart what tensor parallelism does not cut: its gradients are added up over tp too."""
    parts = [block.mixer_norm, block.channel_norm, getattr(block.channel_mixer, "router", None)]
    fully_shard([part for part in parts if part is not None], mesh=shared, mp_policy=exact,
                reshard_after_forward=reshard)
    if isinstance(block.mixer, Attention) and not isinstance(block.mixer.k.weight, DTensor):
        fully_shard([block.mixer.k, block.mixer.v], mesh=shared, mp_policy=policy, reshard_after_forward=reshard)
    if isinstance(block.channel_mixer, MoELayer) and block.channel_mixer.shared is not None:
        fully_shard(block.channel_mixer.shared, mesh=shared, mp_policy=policy, reshard_after_forward=reshard)


def _shard(
    module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, alone: set[nn.Parameter],
    reshard: bool,
) -> None:
    fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=_other_dim,
                ignored_params=alone.intersection(module.parameters()), reshard_after_forward=reshard)


def _features_dim(experts: Experts, parameter: nn.Parameter) -> Shard:
    """Cut d_model: ep and etp cut the other dims, so that any number of ranks fits."""
    return Shard(1 if parameter is experts.down else 2)


def _other_dim(parameter: nn.Parameter) -> Shard | None:
    """Cut the dim of a matrix that tensor parallelism does not cut, so that both never meet on one."""
    if not isinstance(parameter, DTensor):
        return None
    (placement,) = parameter.placements
    assert isinstance(placement, Shard)
    return Shard(1 - placement.dim)
