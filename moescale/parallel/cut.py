"""Weights cut over ranks, as their descriptions say.

Tensor parallelism: ranks of `tp` work on each token together, column-wise on what begins a sublayer (query, key, value,
gate, up), row-wise on what ends it, on embedding and head by token (Shoeybi et al., 2019); between sublayers each rank
has its own positions (Korthikanti et al., 2022). Expert parallelism: the experts of a layer lie on the ranks of `ep`,
each of them on those of `etp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from moescale.spec.model import ModelSpec
from moescale.spec.weights import Weight


def spread_matrices(model: nn.Module, spec: ModelSpec, tp: DeviceMesh) -> None:
    """Keep this rank's part of every matrix that ranks of tp work with together, as DTensors.

    What cannot be shared out stays whole: key and value heads that are fewer than the ranks.
    """
    for module, weight in _weights_here(model, spec):
        if weight.view == "dense" and weight.divides_among(tp.size()):
            _cut(module, weight, tp, [weight.cut_dim])


def spread_experts(model: nn.Module, spec: ModelSpec, ranks: DeviceMesh) -> None:
    """Keep this rank's experts, or its share of them, as DTensors. ranks: axes (ep, etp)"""
    for module, weight in _weights_here(model, spec):
        if weight.view == "sparse":
            _cut(module, weight, ranks, [weight.dims.index("experts"), weight.cut_dim])


def _weights_here(model: nn.Module, spec: ModelSpec) -> Iterator[tuple[nn.Module, Weight]]:
    """Find the module of each weight that learns; a stage of a pipeline has some of them."""
    modules = dict(model.named_modules())
    for weight in spec.weights():
        module = modules.get(".".join(weight.name[:-1]))
        if module is not None and weight.learns:
            yield module, weight


def _cut(module: nn.Module, weight: Weight, ranks: DeviceMesh, dims: Sequence[int]) -> None:
    """Put this rank's part of a weight into the place of the whole. dims: those that the axes of `ranks` cut"""
    name = weight.name[-1]
    whole = module.get_parameter(name).data
    part = distribute_tensor(whole, ranks, [Shard(dim) for dim in dims], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(part))
