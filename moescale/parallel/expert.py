"""Expert parallelism: a layer's experts are cut over the ranks of `ep`, tokens travel to them."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from moescale.model.language_model import LanguageModel
from moescale.moe.dispatchers import AllToAllDispatcher
from moescale.moe.layer import MoELayer


def spread_experts(model: LanguageModel, ep: DeviceMesh) -> None:
    """Keep this rank's experts only, as DTensors, and send tokens to the others by all-to-all."""
    for layer in moe_layers(model):
        for name, weight in layer.experts.named_parameters():
            part = distribute_tensor(weight.data, ep, [Shard(0)], src_data_rank=None)
            layer.experts.register_parameter(name, nn.Parameter(part))
        layer.dispatcher = AllToAllDispatcher(ep.get_group())


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The model's MoE layers, in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]
