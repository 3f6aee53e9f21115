"""Causal attention on a processor: torch's own kernel per block of queries, with only the keys that the block sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moescale.ops.attention_pattern import AttentionPattern

aten = torch.ops.aten
BLOCK = 64  # queries; 32 takes a twentieth less on two cores and leaves many cores idle, 128 a tenth more


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    """Compute causal attention, skipping the keys that a window or documents hide.

    q, k, v, pattern: as in `attention`, causal, on the CPU. -> like q
    bfloat16 is computed in float32: on processors the kernel's bfloat16 backward takes twice the time.
    """
    return _Blocks.apply(q, k, v, pattern)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
        upcast_q, upcast_k, upcast_v = _upcast(q), _upcast(k), _upcast(v)
        out = torch.empty(q.shape, dtype=q.dtype)
        log_sum = upcast_q.new_empty(q.shape[:3])
        for queries, keys, mask in _blocks(q.shape[1], k.shape[1], pattern, upcast_q.dtype):
            block_out, block_log_sum = aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(upcast_q, queries), _heads_first(upcast_k, keys), _heads_first(upcast_v, keys),
                attn_mask=mask, scale=pattern.scale,
            )  # [batch, heads, queries, head_dim], [batch, heads, queries]
            out[:, queries] = block_out.transpose(1, 2)
            log_sum[:, queries] = block_log_sum.transpose(1, 2)
        ctx.pattern = pattern
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, log_sum = ctx.saved_tensors
        upcast_q, upcast_k, upcast_v, upcast_out = _upcast(q), _upcast(k), _upcast(v), _upcast(out)
        grad = _upcast(grad)
        grad_q = torch.empty(q.shape, dtype=q.dtype)
        # Blocks share keys, so that the gradients of keys and values accumulate, in the upcast dtype.
        grad_k, grad_v = torch.zeros(k.shape, dtype=upcast_q.dtype), torch.zeros(v.shape, dtype=upcast_q.dtype)
        for queries, keys, mask in _blocks(q.shape[1], k.shape[1], ctx.pattern, upcast_q.dtype):
            block_grad_q, block_grad_k, block_grad_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(grad, queries), _heads_first(upcast_q, queries), _heads_first(upcast_k, keys),
                _heads_first(upcast_v, keys), _heads_first(upcast_out, queries), _heads_first(log_sum, queries),
                0.0, False, attn_mask=mask, scale=ctx.pattern.scale,
            )
            grad_q[:, queries] = block_grad_q.transpose(1, 2)
            grad_k[:, keys] += block_grad_k.transpose(1, 2)
            grad_v[:, keys] += block_grad_v.transpose(1, 2)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _blocks(
    seq_q: int, seq_k: int, pattern: AttentionPattern, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Walk the blocks of queries. -> for each: its queries, the keys that any of them sees, the bias of the scores"""
    first, mask = _first_keys(seq_q, seq_k, pattern), torch.empty(0)
    for start in range(0, seq_q, BLOCK):
        queries = slice(start, min(start + BLOCK, seq_q))
        keys = slice(first[start], seq_k - seq_q + queries.stop)
        shape = (queries.stop - start, keys.stop - keys.start)
        if pattern.positions is not None or mask.shape[-2:] != shape:  # without documents, one shape has one mask
            mask = pattern.bias(queries, keys, seq_q, seq_k, dtype, torch.device("cpu"))
        yield queries, keys, mask


def _first_keys(seq_q: int, seq_k: int, pattern: AttentionPattern) -> list[int]:
    """Find the first key that any sequence sees, from each query on. -> [seq_q]; it never decreases"""
    index = torch.arange(seq_k)
    first = torch.zeros_like(index) if pattern.window is None else (index - pattern.window + 1).clamp(min=0)
    if pattern.positions is not None:
        first = torch.maximum(first, pattern.documents()[0].amin(0))
    return first[seq_k - seq_q :].tolist()


def _heads_first(x: Tensor, positions: slice) -> Tensor:
    """[batch, seq, heads, ...] -> [batch, heads, positions, ...]"""
    return x[:, positions].transpose(1, 2)


def _upcast(x: Tensor) -> Tensor:
    """Cast to at least float32, with contiguous features: the kernel assumes their stride to be 1 unchecked."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if x.stride(-1) == 1 else x.contiguous()
