"""Causal attention on a processor: torch's own kernel, block by block of queries, each with the keys that it sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moescale.ops.attention_pattern import Pattern

aten = torch.ops.aten
BLOCK = 64  # queries; 32 takes a twentieth less on two cores and leaves many cores idle, 128 a tenth more


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Skip what a window or documents hide. q, k, v, pattern: as in `attention`, causal, on the CPU. -> like q

    The kernel works in float32 for bfloat16 too: on processors its bfloat16 backward takes twice the time.
    """
    return _Blocks.apply(q, k, v, pattern)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        wide_q, wide_k, wide_v = _wide(q), _wide(k), _wide(v)
        out = torch.empty(q.shape, dtype=q.dtype)
        logs = wide_q.new_empty(q.shape[:3])
        for rows, keys, mask in _blocks(q.shape[1], k.shape[1], pattern, wide_q.dtype):
            part, log = aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(wide_q, rows), _heads_first(wide_k, keys), _heads_first(wide_v, keys), attn_mask=mask,
                scale=pattern.scale,
            )  # [batch, heads, rows, head_dim], [batch, heads, rows]
            out[:, rows] = part.transpose(1, 2)
            logs[:, rows] = log.transpose(1, 2)
        ctx.pattern = pattern
        ctx.save_for_backward(q, k, v, out, logs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, logs = ctx.saved_tensors
        wide_q, wide_k, wide_v, wide_out, grad = _wide(q), _wide(k), _wide(v), _wide(out), _wide(grad)
        grad_q = torch.empty(q.shape, dtype=q.dtype)
        grad_k, grad_v = torch.zeros(k.shape, dtype=wide_q.dtype), torch.zeros(v.shape, dtype=wide_q.dtype)
        for rows, keys, mask in _blocks(q.shape[1], k.shape[1], ctx.pattern, wide_q.dtype):
            of_q, of_k, of_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(grad, rows), _heads_first(wide_q, rows), _heads_first(wide_k, keys),
                _heads_first(wide_v, keys), _heads_first(wide_out, rows), _heads_first(logs, rows), 0.0, False,
                attn_mask=mask, scale=ctx.pattern.scale,
            )
            grad_q[:, rows] = of_q.transpose(1, 2)
            grad_k[:, keys] += of_k.transpose(1, 2)
            grad_v[:, keys] += of_v.transpose(1, 2)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _blocks(
    seq_q: int, seq_k: int, pattern: Pattern, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor]]:
    """-> for each block of queries: its rows, the keys that one of them can see, what to add to the scores."""
    first, mask = _first_keys(seq_q, seq_k, pattern), torch.empty(0)
    for start in range(0, seq_q, BLOCK):
        rows = slice(start, min(start + BLOCK, seq_q))
        keys = slice(first[start], seq_k - seq_q + rows.stop)
        shape = (rows.stop - start, keys.stop - keys.start)
        if pattern.positions is not None or mask.shape[-2:] != shape:  # without documents, one shape has one mask
            mask = pattern.bias(rows, keys, seq_q, seq_k, dtype, torch.device("cpu"))
        yield rows, keys, mask


def _first_keys(seq_q: int, seq_k: int, pattern: Pattern) -> list[int]:
    """-> for each query, before which key no query of any sequence looks, from there on."""
    index = torch.arange(seq_k)
    first = torch.zeros_like(index) if pattern.window is None else (index - pattern.window + 1).clamp(min=0)
    if pattern.positions is not None:
        first = torch.maximum(first, pattern.documents()[0].amin(0))
    return first[seq_k - seq_q :].tolist()


def _heads_first(x: Tensor, of: slice) -> Tensor:
    return x[:, of].transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least, and features side by side: the kernel takes their stride to be 1 and does not look."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if x.stride(-1) == 1 else x.contiguous()
