"""Fully sharded data parallelism (FSDP2), also with replicas (HSDP), and the precision of its traffic."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from moescale.model.language_model import LanguageModel
from moescale.parallel.expert import moe_layers


def shard_parameters(model: LanguageModel, dense: DeviceMesh, experts: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Cut every weight over the ranks that see other tokens; gradients are added up over them, in float32.

    dense, experts: the data axes of the two views, (fsdp) or (dp_replicate, fsdp), likewise with efsdp.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
        reduce_dtype=torch.float32, cast_forward_inputs=False,
    )
    alone: set[nn.Parameter] = set()  # experts that no other rank holds: nothing to gather, nothing to add up
    for layer in moe_layers(model):
        fully_shard(layer.router, mesh=dense, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))  # float32
        if experts.size() == 1:
            alone.update(layer.experts.parameters())
        else:
            # ep cuts the experts, this cuts their features: both never meet on one dim, any efsdp fits
            fully_shard(layer.experts, mesh=experts, mp_policy=policy, shard_placement_fn=lambda _: Shard(1))
    for block in model.blocks:
        fully_shard(block, mesh=dense, mp_policy=policy, ignored_params=_within(block, alone))
    fully_shard(model, mesh=dense, mp_policy=policy, ignored_params=_within(model, alone))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by global counts; gradients are plain sums
            module.set_force_sum_reduction_for_comms(True)


def _within(module: nn.Module, parameters: set[nn.Parameter]) -> set[nn.Parameter]:
    return parameters.intersection(module.parameters())
