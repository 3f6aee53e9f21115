"""Megatron-Core's model as its stored arguments and tensors say, for `--verify`: read here once more, by itself."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moescale.checkpoint.strided_view import read_region, region
from moescale.convert.formats.megatron.files import stored_arguments
from moescale.convert.mapping.mapped import Opened
from moescale.verify.reference import attend, feed_forward, rms_norm, rotate

ATTENTION_NORMS = ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
MLP_NORMS = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


@torch.no_grad()
def logits(opened: Opened, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Run the model in float32, with weights rounded to `dtype` first.

    tokens: [batch, seq] int64. Returns [batch, seq, vocab] float32.
    """
    args = stored_arguments(opened.path)
    weights = _Weights(opened, args, dtype)
    eps = _first(args, "norm_epsilon", "layernorm_epsilon", default=1e-5)
    embedding = torch.cat(weights.outer("embedding.word_embeddings.weight", 0))
    x = functional.embedding(tokens, embedding)
    for layer in range(args.num_layers):
        y = rms_norm(x, weights.inner(layer, *ATTENTION_NORMS)[0], eps)
        x = x + _attention(args, weights, layer, y)
        y = rms_norm(x, weights.inner(layer, *MLP_NORMS)[0], eps)
        x = x + (_mixture(args, weights, layer, y) if _is_mixture(args, layer) else _dense(args, weights, layer, y))
    x = rms_norm(x, weights.outer("decoder.final_layernorm.weight", -1)[0], eps)
    untied = getattr(args, "untie_embeddings_and_output_weights", False)
    return x @ (torch.cat(weights.outer("output_layer.weight", -1)) if untied else embedding).T


def _first(args: Namespace, *names: str, default: Any = None) -> Any:
    """Look for the first of these arguments that is set."""
    return next((found for name in names if (found := getattr(args, name, None)) is not None), default)


def _is_mixture(args: Namespace, layer: int) -> bool:
    frequency = _first(args, "moe_layer_freq", default=1)
    every = layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])
    return bool(_first(args, "num_experts")) and every


def _attention(args: Namespace, weights: _Weights, layer: int, x: Tensor) -> Tensor:
    heads, window = args.num_attention_heads, _first(args, "window_size")
    groups = args.num_query_groups if _first(args, "group_query_attention") else heads
    dim = _first(args, "kv_channels", default=args.hidden_size // heads)
    total = torch.zeros_like(x)
    shards = zip(weights.inner(layer, "self_attention.linear_qkv.weight"),
                 weights.inner(layer, "self_attention.linear_proj.weight"), strict=True)
    for inward, outward in shards:  # a group: its queries' heads, then its key's, then its value's
        together = (x @ inward.T).unflatten(-1, (-1, heads // groups + 2, dim))
        q, k, v = together[..., :-2, :].flatten(2, 3), together[..., -2, :], together[..., -1, :]
        if _first(args, "position_embedding_type") != "none":
            q, k = (rotate(part, _first(args, "rotary_base", default=10000)) for part in (q, k))
        total += attend(q, k, v, window[0] if window and window[0] >= 0 else None) @ outward.T
    return total


def _shards(args: Namespace, x: Tensor, first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Add up what the shards of a feed-forward compute, each with its part of gate and of up in one matrix."""
    gated = bool(_first(args, "swiglu"))
    return torch.stack([feed_forward(x, one.chunk(2) if gated else [one], two, "swiglu" if gated else "gelu")
                        for one, two in zip(first, second, strict=True)]).sum(0)


def _dense(args: Namespace, weights: _Weights, layer: int, x: Tensor, prefix: str = "mlp.") -> Tensor:
    return _shards(args, x, weights.inner(layer, prefix + "linear_fc1.weight"),
                   weights.inner(layer, prefix + "linear_fc2.weight"))


def _mixture(args: Namespace, weights: _Weights, layer: int, x: Tensor) -> Tensor:
    weight = _route(args, weights, layer, x)
    total = torch.zeros_like(x)
    for expert in range(args.num_experts):
        rows = weight[..., expert].nonzero(as_tuple=True)
        first, second = weights.expert(layer, expert)
        total[rows] += weight[..., expert][rows].unsqueeze(-1) * _shards(args, x[rows], first, second)
    if _first(args, "moe_shared_expert_intermediate_size"):
        total += _dense(args, weights, layer, x, "mlp.shared_experts.")
    return total


def _route(args: Namespace, weights: _Weights, layer: int, x: Tensor) -> Tensor:
    """Weigh each token's experts; no token is dropped. Returns [batch, seq, experts], zero where one is not chosen."""
    scores = x @ weights.inner(layer, "mlp.router.weight")[0].T
    best = _first(args, "moe_router_topk", default=2)
    if _first(args, "moe_router_score_function") == "sigmoid":
        scores = scores.sigmoid()
        biased = scores + weights.inner(layer, "mlp.router.expert_bias")[0]
        if groups := _first(args, "moe_router_group_topk"):  # a group is as good as its best experts together
            parts = biased.unflatten(-1, (args.moe_router_num_groups, -1))
            good = parts.topk(best // groups, -1).values.sum(-1).topk(groups, -1).indices
            closed = torch.ones_like(parts[..., 0], dtype=torch.bool).scatter(-1, good, False)
            biased = parts.masked_fill(closed.unsqueeze(-1), -math.inf).flatten(-2)
        chosen = biased.topk(best, -1).indices
        share = scores.gather(-1, chosen)
        share = share / (share.sum(-1, keepdim=True) + 1e-20) if best > 1 else share
        share = share * _first(args, "moe_router_topk_scaling_factor", default=1.0)
    elif _first(args, "moe_router_pre_softmax"):
        share, chosen = scores.softmax(-1).topk(best, -1)
    else:
        share, chosen = scores.topk(best, -1)
        share = share.softmax(-1)
    return torch.zeros_like(scores).scatter(-1, chosen, share)


class _Weights:
    """Finds tensors by Megatron's names, whole or as the ranks of tensor parallelism hold them."""

    def __init__(self, opened: Opened, args: Namespace, dtype: torch.dtype | None) -> None:
        self.opened, self.dtype = opened, dtype
        self.per_rank = opened.layout.style != "torch_dist"
        self.tp, self.pp, self.ep, self.etp = 1, 1, 1, 1
        if self.per_rank:
            self.tp = _first(args, "tensor_model_parallel_size", default=1)
            self.pp = _first(args, "pipeline_model_parallel_size", default=1)
            self.ep = _first(args, "expert_model_parallel_size", default=1)
            self.etp = _first(args, "expert_tensor_parallel_size", default=self.tp)
        self.layers, self.experts = args.num_layers // self.pp, (_first(args, "num_experts") or 0) // self.ep
        self.args = args

    def read(self, key: str) -> Tensor:
        stored = self.opened.tensors[key]
        values = read_region(stored, region(stored.shape)).reshape(stored.shape)
        rounded = values if self.dtype is None or key.endswith("expert_bias") else values.to(self.dtype)
        return rounded.float()

    def file(self, tp: int, pp: int, ep: int) -> str:
        if not self.per_rank:
            return ""
        return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if self.pp > 1 else "") + (f"_{ep:03d}" if self.ep > 1 else "") + ":"

    def outer(self, name: str, stage: int) -> list[Tensor]:
        """Read what is in no layer, on the first stage (0) or the last (-1)."""
        return [self.read(self.file(rank, stage % self.pp, 0) + name) for rank in range(self.tp)]

    def inner(self, layer: int, *names: str) -> list[Tensor]:
        """Read a layer's tensor, by the first of these names that is there."""
        return [self.found(self.file(rank, layer // self.layers, 0), layer, *names) for rank in range(self.tp)]

    def found(self, file: str, layer: int, *names: str) -> Tensor:
        for name in names:
            numbered, stacked = f"{file}decoder.layers.{layer % self.layers}.{name}", f"decoder.layers.{name}"
            if numbered in self.opened.tensors:
                return self.read(numbered)
            if numbered + "_w" in self.opened.tensors:  # gate and up apart
                return torch.cat((self.read(numbered + "_w"), self.read(numbered + "_v")))
            if stacked in self.opened.tensors:
                return self.read(stacked)[layer]
        raise KeyError(names[0])

    def expert(self, layer: int, expert: int) -> tuple[list[Tensor], list[Tensor]]:
        """Read the two matrices of an expert, each as its shards."""
        rank, local = (expert // self.experts, expert % self.experts) if self.experts else (0, 0)
        shards = [self.file(tp, layer // self.layers, rank) for tp in range(self.etp)]
        first, second = (tuple(self.matrix(file, layer, expert, local, part) for file in shards)
                         for part in ("linear_fc1", "linear_fc2"))
        return list(first), list(second)

    def matrix(self, file: str, layer: int, expert: int, local: int, part: str) -> Tensor:
        style, prefix = self.opened.layout.style, "mlp.experts."
        if style == "sequential":
            return self.found(file, layer, f"{prefix}local_experts.{local}.{part}.weight")
        if style == "te_grouped":
            return self.found(file, layer, f"{prefix}{part}.weight{local}")
        if style == "grouped":  # one matrix [in, out] after another
            both = self.found(file, layer, prefix + ("weight1" if part == "linear_fc1" else "weight2"))
            width = self.args.hidden_size
            return (both.view(self.experts, width, -1) if part == "linear_fc1" else
                    both.view(self.experts, -1, width))[local].T
        apart = f"{prefix}experts.{expert}.{part}.weight"
        if any(f"decoder.layers.{layer}.{apart}{end}" in self.opened.tensors for end in ("", "_w")):
            return self.found(file, layer, apart)
        return self.found(file, layer, f"{prefix}experts.{part}.weight")[expert]
