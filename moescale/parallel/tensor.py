"""Tensor parallelism: matrices are cut over the ranks of `tp`, which work on each token together.

Column-wise what begins a sublayer (query, key, value, gate, up), row-wise what ends it, the embedding and the head by
token (Shoeybi et al., 2019); between sublayers each rank has its own positions (Korthikanti et al., 2022).
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from moescale.layers.feed_forward import FeedForward
from moescale.layers.linear import Embedding, Linear
from moescale.mixers.attention import Attention
from moescale.model.block import Block
from moescale.model.language_model import LanguageModel
from moescale.ops.head_losses import head_losses


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
    if model.embedding is not None:
        model.embedding.first_token = _first_token(model.embedding, tp)


def spread_losses(piece: LanguageModel, tp: DeviceMesh) -> None:
    """Take the losses from a head whose vocabulary is cut. piece: with its matrices spread"""
    head = piece.head or piece.embedding
    if piece.norm is not None and head is not None:
        piece.sum_losses = partial(head_losses, first_token=_first_token(head, tp), group=tp.get_group())


def _spread_attention(attention: Attention, tp: DeviceMesh) -> None:
    _cut(attention.q, 0, tp)
    attention.first_head = attention.num_heads // tp.size() * tp.get_local_rank()
    _cut(attention.o, 1, tp)
    num_kv_heads, head_dim = attention.k.weight.shape[0] // attention.head_dim, attention.head_dim
    for linear in (attention.k, attention.v):
        if num_kv_heads % tp.size() == 0:
            _cut(linear, 0, tp)
        else:  # fewer heads than ranks: every rank has all, and uses the one that its queries look at
            head = tp.get_local_rank() * num_kv_heads // tp.size()
            linear.rows = slice(head * head_dim, (head + 1) * head_dim)


def _cut(module: Linear | Embedding, dim: int, tp: DeviceMesh) -> None:
    weight = distribute_tensor(module.weight.data, tp, [Shard(dim)], src_data_rank=None)
    module.register_parameter("weight", nn.Parameter(weight))


def _first_token(module: Linear | Embedding, tp: DeviceMesh) -> int:
    return module.weight.shape[0] // tp.size() * tp.get_local_rank()
