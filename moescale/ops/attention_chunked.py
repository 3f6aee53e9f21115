"""Exact attention in memory that does not grow with the sequence, on any device (Rabe and Staats, 2021, sec. 3).

Next to inputs, outputs and gradients there is one chunk of scores at a time. Backward computes them again from the
log-sum-exp, where the paper lets automatic differentiation run each chunk once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moescale.ops.attention_pattern import NOTHING, AttentionPattern, Remembered, for_heads

CHUNK = 512  # queries, and keys


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, remembered: Remembered = NOTHING
) -> Tensor:
    """Compute attention over one chunk of scores at a time.

    q, k, v, pattern, remembered: as in `attention`; any floating dtype, computed in at least float32. -> like q
    """
    return _Chunked.apply(q, k, v, pattern, *remembered)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, memory_k: Tensor | None,
        memory_v: Tensor | None,
    ) -> Tensor:
        out = torch.empty_like(q)
        log_sum = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_upcast_dtype(q))
        for queries in _chunks(0, q.shape[1]):
            total = log_sum.new_zeros((*log_sum.shape[:2], queries.stop - queries.start, 1))
            top, chunk_out = torch.full_like(total, -1e30), total  # not -inf, whose difference to itself is no number
            for keys in _seen(queries, q, k, pattern):
                scores = _scores(q, k, queries, keys, pattern)  # [batch, heads, queries, keys]
                # The online softmax: what was added up under the old maximum shrinks to the new one.
                higher = torch.maximum(top, scores.amax(-1, keepdim=True))
                shrink = (top - higher).exp_()
                scores = scores.sub_(higher).exp_()
                total = total * shrink + scores.sum(-1, keepdim=True)
                chunk_out = chunk_out * shrink + _by_kv_head(scores, _heads_first(v, keys))
                top = higher
            out[:, queries] = (chunk_out / total).transpose(1, 2).to(q.dtype)
            log_sum[:, :, queries] = (top + total.log()).squeeze(-1)
        ctx.pattern, ctx.remembers = pattern, memory_k is not None
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        scale = ctx.pattern.scale
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=log_sum.dtype) for x in (k, v))
        later_k, later_v = ((torch.zeros_like(grad_k), torch.zeros_like(grad_v)) if ctx.remembers else NOTHING)
        for queries in _chunks(0, q.shape[1]):
            query, grad = _heads_first(q, queries), _heads_first(grad_out, queries)
            delta = (grad * _heads_first(out, queries)).sum(-1, keepdim=True)
            grad_query = torch.zeros_like(query)
            for keys in _seen(queries, q, k, ctx.pattern):
                probs = _scores(q, k, queries, keys, ctx.pattern).sub_(log_sum[:, :, queries].unsqueeze(-1)).exp_()
                # Through the softmax: probs * (grad_probs - delta).
                grad_scores = _by_kv_head(grad, _heads_first(v, keys).mT).sub_(delta).mul_(probs).mul_(scale)
                grad_query += _by_kv_head(grad_scores, _heads_first(k, keys))
                if later_k is not None and later_v is not None:
                    place, key = _places(queries, keys, q, k)
                    later = ~for_heads(ctx.pattern.without_memory.visible(place, key))
                    later_v[:, keys] += _over_queries(probs * later, grad, k.shape[2])
                    later_k[:, keys] += _over_queries(grad_scores * later, query, k.shape[2])
                    probs, grad_scores = probs.masked_fill_(later, 0), grad_scores.masked_fill_(later, 0)
                grad_v[:, keys] += _over_queries(probs, grad, k.shape[2])
                grad_k[:, keys] += _over_queries(grad_scores, query, k.shape[2])
            grad_q[:, queries] = grad_query.transpose(1, 2).to(q.dtype)
        grads = (x if x is None else x.to(k.dtype) for x in (grad_k, grad_v, None, later_k, later_v))
        return grad_q, *grads


def _upcast_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _heads_first(x: Tensor, positions: slice) -> Tensor:
    """[batch, seq, heads, head_dim] -> [batch, heads, positions, head_dim], upcast"""
    return x[:, positions].transpose(1, 2).to(_upcast_dtype(x))


def _by_kv_head(x: Tensor, y: Tensor) -> Tensor:
    """Multiply each head with the key head that serves it. x: [batch, heads, a, b]; y: [batch, kv_heads, b, c]"""
    return (x.reshape(*y.shape[:2], -1, x.shape[-1]) @ y).view(*x.shape[:-1], -1)


def _over_queries(x: Tensor, y: Tensor, kv_heads: int) -> Tensor:
    """Multiply and add up over queries and over the query heads of a key head.

    x: [batch, heads, queries, keys]. y: [batch, heads, queries, head_dim]. -> [batch, keys, kv_heads, head_dim]
    """
    x, y = (tensor.reshape(len(tensor), kv_heads, -1, tensor.shape[-1]) for tensor in (x, y))
    return (x.mT @ y).transpose(1, 2)


def _scores(q: Tensor, k: Tensor, queries: slice, keys: slice, pattern: AttentionPattern) -> Tensor:
    """Compute scaled, biased scores. -> [batch, heads, queries, keys]"""
    scores = _by_kv_head(_heads_first(q, queries), _heads_first(k, keys).mT).mul_(pattern.scale)
    return scores.add_(pattern.bias(*_places(queries, keys, q, k), scores.dtype))


def _places(queries: slice, keys: slice, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Give the places of queries and keys among all keys. -> [queries], [keys] int64"""
    query, key = (torch.arange(some.start, some.stop, device=q.device) for some in (queries, keys))
    return query + k.shape[1] - q.shape[1], key


def _chunks(begin: int, end: int) -> Iterator[slice]:
    for start in range(begin, end, CHUNK):
        yield slice(start, min(start + CHUNK, end))


def _seen(queries: slice, q: Tensor, k: Tensor, pattern: AttentionPattern) -> Iterator[slice]:
    """Walk the chunks of keys, except those after every query, or out of reach and without global tokens."""
    shift, reach = k.shape[1] - q.shape[1], pattern.visibility.reach
    begin = 0 if reach is None else max(0, queries.start + shift - reach + 1)
    tokens = pattern.global_keys(begin, q.device)
    wanted = set() if tokens is None else set((tokens // CHUNK).flatten().tolist())
    yield from (keys for keys in _chunks(0, begin) if keys.start // CHUNK in wanted)
    yield from _chunks(begin, queries.stop + shift if pattern.causal else k.shape[1])
