"""How the model is spread, on one page. Nothing above this folder knows."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from moescale.config import Config
from moescale.model.build import build_model
from moescale.model.initialize import initialize
from moescale.model.language_model import LanguageModel
from moescale.parallel.expert import moe_layers, spread_experts
from moescale.parallel.fsdp import shard_parameters
from moescale.parallel.mesh import Mesh


def build_parallel_model(config: Config, mesh: Mesh) -> LanguageModel:
    """Build this rank's part of the model, filled with its first values: on meta, then cut, then in memory."""
    model = build_model(config, "meta")
    parallelize(model, mesh)
    model.to_empty(device=mesh.device)
    for layer in moe_layers(model):
        layer.statistics.reset()
    initialize(model, config.run.seed)
    return model


def parallelize(model: LanguageModel, mesh: Mesh) -> None:
    """Cut the model over the ranks: experts first, then every weight over the data axes."""
    if mesh.dense is None or mesh.sparse is None:
        return
    if mesh.parallel.ep > 1:
        spread_experts(model, mesh.sparse["ep"])
    shard_parameters(model, _data_axes(mesh.dense, "fsdp"), _data_axes(mesh.sparse, "efsdp"), model.compute_dtype)


def _data_axes(view: DeviceMesh, shard_axis: str) -> DeviceMesh:
    """The axes over which gradients are added up; replicas only where there are any."""
    return view["dp_replicate", shard_axis] if view["dp_replicate"].size() > 1 else view[shard_axis]
