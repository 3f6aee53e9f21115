"""Runs the model of a DeepSpeed checkpoint as the `config.yaml` next to it says, independently, for `--verify`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moescale.checkpoint.strided_view import read_region, region
from moescale.convert.mapping.mapped import Opened
from moescale.spec.feed_forward import GATED
from moescale.verify.reference import attend, feed_forward, rms_norm, rotate, slopes


@torch.no_grad()
def logits(opened: Opened, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Run the model in float32, with weights rounded to `dtype` first.

    tokens: [batch, seq] int64. Returns [batch, seq, vocab] float32.
    """
    model, weights = opened.config.model, _Weights(opened, dtype)
    embedding = torch.cat(weights.shards("embedding.weight"))
    x = functional.embedding(tokens, embedding)
    for number, layer in enumerate(model.layers):
        prefix = f"blocks.{number}."
        y = _norm(opened, x, weights.shards(prefix + "mixer_norm.weight")[0])
        mixed = _attention(opened, weights, prefix + "mixer.", y)
        if model.block == "serial":
            x = x + mixed
            y = _norm(opened, x, weights.shards(prefix + "channel_norm.weight")[0])
        prefix += "channel_mixer."
        mixture = layer.channel_mixer == "moe"
        if mixture:
            channel_mixed = _mixture(opened, weights, prefix, y, number)
        else:
            channel_mixed = _dense(weights, prefix, y, opened.config.feed_forward.activation)
        x = x + channel_mixed if model.block == "serial" else x + mixed + channel_mixed
    x = _norm(opened, x, weights.shards("norm.weight")[0])
    head = embedding if model.tied_embeddings else torch.cat(weights.shards("head.weight"))
    return x @ head.T * (model.d_model**-0.5 if model.scale_logits else 1.0)


def _norm(opened: Opened, x: Tensor, weight: Tensor) -> Tensor:
    model = opened.config.model
    if model.norm == "layernorm":
        return functional.layer_norm(x, weight.shape, weight, None, model.norm_eps)
    return rms_norm(x, weight, model.norm_eps)


def _attention(opened: Opened, weights: _Weights, prefix: str, x: Tensor) -> Tensor:
    attention = opened.config.attention
    q, k, v = (torch.cat([x @ part.T for part in weights.shards(f"{prefix}{name}.weight")], -1)
               .unflatten(-1, (-1, attention.head_dim)) for name in "qkv")
    if attention.positions == "rope":
        q, k = rotate(q, attention.rope_theta), rotate(k, attention.rope_theta)
    before = None if attention.window is None else attention.window - 1
    mixed = attend(q, k, v, before, slopes(attention.num_heads) if attention.positions == "alibi" else None)
    return mixed @ torch.cat(weights.shards(prefix + "o.weight"), 1).T


def _dense(weights: _Weights, prefix: str, x: Tensor, activation: str) -> Tensor:
    names = ("gate", "up") if activation in GATED else ("up",)
    first = [torch.cat(weights.shards(f"{prefix}{name}.weight")) for name in names]
    return feed_forward(x, first, torch.cat(weights.shards(prefix + "down.weight"), 1), activation)


def _mixture(opened: Opened, weights: _Weights, prefix: str, x: Tensor, number: int) -> Tensor:
    """Route as DeepSpeed's gate does: one expert by its share of all, several by their shares of what is chosen."""
    moe = opened.config.moe
    share, chosen = (x @ weights.shards(prefix + "deepspeed_moe.gate.wg.weight")[0].T).softmax(-1).topk(moe.top_k, -1)
    if moe.top_k > 1:
        share = share / share.sum(-1, keepdim=True)
    total = torch.zeros_like(x)
    for expert in range(moe.num_experts):
        weight = (share * (chosen == expert)).sum(-1)
        rows = weight.nonzero(as_tuple=True)
        expert_weights = weights.for_expert(number, expert)
        expert_prefix = f"{prefix}deepspeed_moe.experts.deepspeed_experts.{expert}."
        total[rows] += weight[rows].unsqueeze(-1) * _dense(expert_weights, expert_prefix, x[rows], moe.activation)
    return total + _dense(weights, prefix + "shared.", x, moe.activation) if moe.num_shared_experts else total


class _Weights:
    """Finds tensors by their names in the files of all ranks. file: what stands before a rank's own name in them"""

    def __init__(self, opened: Opened, dtype: torch.dtype | None, file: str = "", ranks: int | None = None) -> None:
        self.opened, self.dtype, self.file = opened, dtype, file
        self.ranks = opened.layout.tp if ranks is None else ranks

    def for_expert(self, number: int, expert: int) -> _Weights:
        """Look into the files of one expert of a layer; they number the layers with experts alone."""
        before = sum(layer.channel_mixer == "moe" for layer in self.opened.config.model.layers[:number])
        file = f"layer_{before}_expert_{expert}_"
        return _Weights(self.opened, self.dtype, file, self.opened.layout.etp)

    def shards(self, name: str) -> list[Tensor]:
        """Read a tensor as the ranks of tensor parallelism hold it."""
        found = []
        for rank in range(self.ranks):
            stored = self.opened.tensors[f"{self.file}mp_rank_{rank:02d}_model_states.pt:{name}"]
            values = read_region(stored, region(stored.shape)).reshape(stored.shape)
            found.append((values if self.dtype is None else values.to(self.dtype)).float())
        return found
