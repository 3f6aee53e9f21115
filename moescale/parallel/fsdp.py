"""Fully sharded data parallelism (FSDP2), also with replicas (HSDP), and the precision of its traffic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from moescale.layers.exact import Exact
from moescale.model.block import Block
from moescale.model.language_model import LanguageModel
from moescale.moe.layer import MoELayer
from moescale.spec.model import ModelSpec
from moescale.spec.weights import Weight

Weights = Mapping[nn.Parameter, Weight]


def shard_parameters(
    pieces: Sequence[LanguageModel], spec: ModelSpec, dense: DeviceMesh, shared: DeviceMesh, experts: DeviceMesh, *,
    rounded: bool = False,
) -> None:
    """Cut every weight over the ranks that see other tokens; gradients are added up over them, in float32.

    pieces: of the model, that lie on this rank. spec: describes the whole of it. dense: the data axes, (fsdp) or
    (dp_replicate, fsdp), of matrices that ranks of tp work with on the same tokens; shared: those of weights that meet
    each token on one rank, which add the ranks of tp; experts: those that hold the same experts. rounded: whether
    gradients, but for those of exact weights, travel in bfloat16.
    """
    # a pipeline's micro-batches take turns, and backward may come in two halves: weights stay gathered during a step
    reshard = all(piece.first and piece.norm is not None for piece in pieces)
    reduce_dtype = torch.promote_types(pieces[0].compute_dtype, torch.float32)
    param_dtype = pieces[0].compute_dtype if pieces[0].compute_dtype != reduce_dtype else None
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)  # weights as they are
    tensor_parallel = shared.size() != dense.size()
    unrounded: set[nn.Module] = set()
    alone: set[nn.Parameter] = set()  # experts that no other rank holds: nothing to gather, nothing to add up
    described = {".".join(weight.name): weight for weight in spec.weights()}
    for piece in pieces:
        weights = {parameter: described[name] for name, parameter in piece.named_parameters()}
        other_dim = partial(_other_dim, weights)
        for block in piece.blocks.values():
            assert isinstance(block, Block)
            if tensor_parallel:
                unrounded.update(_shard_uncut(block, weights, shared, policy, exact, reshard))
            for part in block.modules():
                if isinstance(part, Exact) and not isinstance(part, FSDPModule):
                    _shard(part, dense, exact, other_dim, alone, reshard)
                    unrounded.add(part)
            if isinstance(block.channel_mixer, MoELayer):
                layer = block.channel_mixer
                if experts.size() == 1:
                    alone.update(layer.experts.parameters())
                else:
                    fully_shard(layer.experts, mesh=experts, mp_policy=policy, reshard_after_forward=reshard,
                                shard_placement_fn=other_dim)
            _shard(block, dense, policy, other_dim, alone, reshard)
        if piece.norm is not None and tensor_parallel:
            fully_shard(piece.norm, mesh=shared, mp_policy=exact, reshard_after_forward=reshard)
            unrounded.add(piece.norm)
        if piece.embedding is not None and piece.head is None and not isinstance(piece.embedding, FSDPModule):
            _shard(piece.embedding, dense, policy, other_dim, alone, False)  # met twice: as head too
            register_fsdp_forward_method(piece.embedding, "as_head")
        _shard(piece, dense, policy, other_dim, alone, False)
        for module in piece.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # losses are divided by global counts; gradients are plain sums
                module.set_force_sum_reduction_for_comms(True)
                if rounded and module not in unrounded:
                    module.set_custom_reduce_scatter(RoundedReduceScatter())  # type: ignore[arg-type]


class RoundedReduceScatter:
    """Adds up the ranks' gradients of which each was rounded to bfloat16 once, and its sum never.

    Ranks send each other their parts and add up in float32 what came. A reduce-scatter of bfloat16 in a ring sends as
    many bytes, and rounds the sum once a hop (Megatron-Core's reduce_scatter_with_fp32_accumulation is the same cure).
    It takes the memory of one more float32 gradient of the unit. FSDP calls it as its own ReduceScatter.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        """Add up. input_tensor: [ranks x part] of this rank, in float32; output_tensor: [part] of the sum"""
        assert op == dist.ReduceOp.SUM
        assert not async_op
        sent = input_tensor.to(torch.bfloat16)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        torch.sum(received.view(group.size(), -1), 0, dtype=output_tensor.dtype, out=output_tensor)


def _shard_uncut(
    block: Block, weights: Weights, shared: DeviceMesh, policy: MixedPrecisionPolicy, exact: MixedPrecisionPolicy,
    reshard: bool,
) -> list[nn.Module]:
    """Set apart what tensor parallelism does not cut: its gradients are added up over tp too.

    What nobody ever cuts, norms and routers, is small and stays as it is: returns these modules.
    """
    units: dict[nn.Module | None, list[nn.Module]] = defaultdict(list)  # by the module above; None is as it is
    for above, part in _uncut_parts(block, weights):
        small = all(weights[parameter].cut is None for parameter in part.parameters())
        units[None if small else above].append(part)
    for unit, parts in units.items():
        fully_shard(parts, mesh=shared, mp_policy=exact if unit is None else policy, reshard_after_forward=reshard)
    return units[None]


def _uncut_parts(module: nn.Module, weights: Weights) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Find the largest parts of a module that are whole on every rank of tp, each behind the module above it."""
    for part in module.children():
        parameters = list(part.parameters())
        if parameters and all(weights[parameter].view != "sparse" and not isinstance(parameter, DTensor)
                              for parameter in parameters):
            yield module, part
        else:
            yield from _uncut_parts(part, weights)


def _shard(
    module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy,
    other_dim: Callable[[nn.Parameter], Shard | None], alone: set[nn.Parameter], reshard: bool,
) -> None:
    fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=other_dim,
                ignored_params=alone.intersection(module.parameters()), reshard_after_forward=reshard)


def _other_dim(weights: Weights, parameter: nn.Parameter) -> Shard | None:
    """Choose a dim that tensor and expert parallelism do not cut, so that two cuts never meet on one."""
    weight = weights[parameter]
    if weight.view != "sparse" and not isinstance(parameter, DTensor):
        return None
    return Shard(next(dim for dim, word in enumerate(weight.dims) if word not in ("experts", weight.cut)))
