"""Exact attention in memory that does not grow with the sequence, on any device (Rabe and Staats, 2021, sec. 3).

Beside inputs, outputs and gradients there is one chunk of scores at a time. Backward computes them again from the
log-sum-exp, where the paper lets automatic differentiation run each chunk once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moescale.ops.attention_pattern import Pattern

CHUNK = 512  # queries, and keys


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """q, k, v, pattern: as in `attention`; any floating dtype, computed in at least float32. -> like q"""
    return _Chunked.apply(q, k, v, pattern)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        out = torch.empty_like(q)
        log_sum = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_wide(q))
        for rows in _chunks(0, q.shape[1]):
            total = log_sum.new_zeros((*log_sum.shape[:2], rows.stop - rows.start, 1))
            top, part = torch.full_like(total, -1e30), total  # not -inf, whose difference to itself is no number
            for keys in _seen(rows, q, k, pattern):
                scores = _scores(q, k, rows, keys, pattern)  # [batch, heads, queries, keys]
                higher = torch.maximum(top, scores.amax(-1, keepdim=True))
                shrink = (top - higher).exp_()
                scores = scores.sub_(higher).exp_()
                total = total * shrink + scores.sum(-1, keepdim=True)
                part, top = part * shrink + _by_kv_head(scores, _heads_first(v, keys)), higher
            out[:, rows] = (part / total).transpose(1, 2).to(q.dtype)
            log_sum[:, :, rows] = (top + total.log()).squeeze(-1)
        ctx.pattern = pattern
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, log_sum = ctx.saved_tensors
        scale = ctx.pattern.scale
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=log_sum.dtype) for x in (k, v))
        for rows in _chunks(0, q.shape[1]):
            query, grad = _heads_first(q, rows), _heads_first(grad_out, rows)
            delta = (grad * _heads_first(out, rows)).sum(-1, keepdim=True)
            of_query = torch.zeros_like(query)
            for keys in _seen(rows, q, k, ctx.pattern):
                probs = _scores(q, k, rows, keys, ctx.pattern).sub_(log_sum[:, :, rows].unsqueeze(-1)).exp_()
                grad_v[:, keys] += _over_queries(probs, grad, k.shape[2])
                of_scores = _by_kv_head(grad, _heads_first(v, keys).mT).sub_(delta).mul_(probs).mul_(scale)
                of_query += _by_kv_head(of_scores, _heads_first(k, keys))
                grad_k[:, keys] += _over_queries(of_scores, query, k.shape[2])
            grad_q[:, rows] = of_query.transpose(1, 2).to(q.dtype)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _heads_first(x: Tensor, of: slice) -> Tensor:
    return x[:, of].transpose(1, 2).to(_wide(x))


def _by_kv_head(x: Tensor, y: Tensor) -> Tensor:
    """Multiply each head with the key head that serves it. x: [batch, heads, a, b]; y: [batch, kv_heads, b, c]"""
    return (x.reshape(*y.shape[:2], -1, x.shape[-1]) @ y).view(*x.shape[:-1], -1)


def _over_queries(x: Tensor, y: Tensor, kv_heads: int) -> Tensor:
    """[batch, heads, queries, keys], [..., queries, head_dim] -> [batch, keys, kv_heads, head_dim], heads added up"""
    x, y = (tensor.reshape(len(tensor), kv_heads, -1, tensor.shape[-1]) for tensor in (x, y))
    return (x.mT @ y).transpose(1, 2)


def _scores(q: Tensor, k: Tensor, rows: slice, keys: slice, pattern: Pattern) -> Tensor:
    scores = _by_kv_head(_heads_first(q, rows), _heads_first(k, keys).mT).mul_(pattern.scale)
    return scores.add_(pattern.bias(rows, keys, q.shape[1], k.shape[1], scores.dtype, q.device))


def _chunks(begin: int, end: int) -> Iterator[slice]:
    for start in range(begin, end, CHUNK):
        yield slice(start, min(start + CHUNK, end))


def _seen(rows: slice, q: Tensor, k: Tensor, pattern: Pattern) -> Iterator[slice]:
    """-> chunks of keys, without those that lie behind every query or before its window"""
    shift = k.shape[1] - q.shape[1]
    begin = 0 if pattern.window is None else max(0, rows.start + shift - pattern.window + 1)
    return _chunks(begin, rows.stop + shift if pattern.causal else k.shape[1])
