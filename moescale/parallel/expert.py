"""Expert parallelism: a layer's experts are cut over the ranks of `ep`, each over those of `etp`; tokens travel."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from moescale.config import Config
from moescale.model.language_model import LanguageModel
from moescale.moe.dispatchers import AllToAllDispatcher
from moescale.moe.layer import MoELayer
from moescale.moe.routers import SigmoidBiasRouter
from moescale.ops.collectives import Group, all_reduce_sum

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


def balance_by_bias(model: LanguageModel, config: Config, group: Group) -> None:
    """Show each router that balances by a bias the load of its layer, of all ranks, once a step.

    group: all ranks, in a pipeline too, where each layer's row is zero on ranks that do not hold it.
    """
    if config.moe.router != "sigmoid_bias":
        return
    layers = {int(index): block.channel_mixer for index, block in model.blocks.items()
              if isinstance(block.channel_mixer, MoELayer)}
    loads = torch.zeros(config.model.num_layers, config.moe.num_experts, dtype=torch.int64,
                        device=next(model.parameters()).device)
    for index, layer in layers.items():
        loads[index] = layer.statistics.tokens_per_expert
    all_reduce_sum(loads, group)
    for index, layer in layers.items():
        assert isinstance(layer.router, SigmoidBiasRouter)
        layer.router.balance(loads[index])


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The model's MoE layers, in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]
