"""Expert parallelism: a layer's experts are cut over the ranks of `ep`, each over those of `etp`; tokens travel."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from moescale.moe.dispatchers import AllToAllDispatcher
from moescale.moe.layer import MoELayer
from moescale.ops.collectives import Group

HIDDEN = {"gate": 1, "up": 1, "down": 2}  # the dim of the hidden features, which `etp` cuts


def spread_experts(model: nn.Module, ranks: DeviceMesh, group: Group) -> None:
    """Keep this rank's experts, or its share of them, as DTensors, and send tokens to the others by all-to-all.

    ranks: axes (ep, etp). group: all of them.
    """
    for layer in moe_layers(model):
        for name, weight in layer.experts.named_parameters():
            part = distribute_tensor(weight.data, ranks, [Shard(0), Shard(HIDDEN[name])], src_data_rank=None)
            layer.experts.register_parameter(name, nn.Parameter(part))
        layer.dispatcher = AllToAllDispatcher(group, copies=ranks["etp"].size())


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The model's MoE layers, in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]
