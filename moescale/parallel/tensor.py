"""Tensor parallelism: matrices are cut over the ranks of `tp`, which work on each token together.

Column-wise what begins a sublayer (query, key, value, gate, up), row-wise what ends it, the embedding and the head by
token (Shoeybi et al., 2019); between sublayers each rank has its own positions (Korthikanti et al., 2022).
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from moescale.layers.feed_forward import FeedForward
from moescale.layers.linear import Embedding, Linear
from moescale.mixers.attention import Attention
from moescale.model.block import Block
from moescale.model.language_model import LanguageModel


def spread_matrices(model: LanguageModel, tp: DeviceMesh) -> None:
    """Keep this rank's cut of every matrix that tensor parallelism cuts, as DTensors."""
    for module in model.modules():
        if isinstance(module, Attention):
            _spread_attention(module, tp)
        elif isinstance(module, Block) and isinstance(module.channel_mixer, FeedForward):
            dense = module.channel_mixer  # the shared experts of a mixture see own positions, and stay whole
            for linear, dim in ((dense.gate, 0), (dense.up, 0), (dense.down, 1)):
                if linear is not None:
                    _cut(linear, dim, tp)
    for end in (model.embedding, model.head):
        if end is not None:
            _cut(end, 0, tp)


def _spread_attention(attention: Attention, tp: DeviceMesh) -> None:
    _cut(attention.q, 0, tp)
    _cut(attention.o, 1, tp)
    if attention.num_kv_heads % tp.size() == 0:  # with fewer heads than ranks every rank keeps all
        _cut(attention.k, 0, tp)
        _cut(attention.v, 0, tp)


def _cut(module: Linear | Embedding, dim: int, tp: DeviceMesh) -> None:
    weight = distribute_tensor(module.weight.data, tp, [Shard(dim)], src_data_rank=None)
    module.register_parameter("weight", nn.Parameter(weight))
