"""FlashAttention-2 in Triton, the host's side: shapes, tiles and launches of `attention_kernels_triton`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from moescale.ops.attention_kernels_triton import MOST_QUERIES, attend, grad_keys, grad_queries
from moescale.ops.attention_pattern import NOTHING, AttentionPattern, Remembered
from moescale.ops.descriptors_triton import allow_descriptors, fitting, padded, unpadded
from moescale.ops.device import shared_bytes


@dataclass(frozen=True)
class AttentionTile:
    """The size of one tile in queries and keys, its warps, and the stages of its loading pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, remembered: Remembered = NOTHING
) -> Tensor:
    """Compute exact attention in memory linear in the sequence (FlashAttention-2, alg. 1 and 2).

    q: [batch, seq_q, heads, head_dim]. k, v: [batch, seq_k, kv_heads, head_dim]. head_dim is 16 to 256; float32,
    bfloat16 or float16, computed in float32. remembered: as in `attention`. -> like q. Every gradient is added up in a
    fixed order.
    """
    if pattern.slopes is not None:
        pattern = replace(pattern, slopes=pattern.slopes.contiguous())
    later = (None if x is None else padded(x) for x in remembered)
    return unpadded(_Flash.apply(padded(q), padded(k), padded(v), pattern, *later), q.shape[3])


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, memory_k: Tensor | None,
        memory_v: Tensor | None,
    ) -> Tensor:
        q, k, v = fitting(q), fitting(k), fitting(v)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        rounded_seq = triton.cdiv(q.shape[1], MOST_QUERIES.value) * MOST_QUERIES.value
        log_sum = torch.empty(q.shape[0], q.shape[2], rounded_seq, dtype=torch.float32, device=q.device)  # in base 2
        bounds = _bounds(pattern)
        if q.numel():
            allow_descriptors()
            attend[_grid(q, tiles(q)[0].queries)](
                q, k, v, out, log_sum, *bounds, pattern.slopes, *_numbers(q, k, v, q, pattern),
                **_options(q, k, pattern, tiles(q)[0]),
            )
        ctx.pattern, ctx.remembers = pattern, memory_k is not None
        ctx.save_for_backward(q, k, v, out, log_sum, *bounds)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum, *bounds = ctx.saved_tensors
        grad, pattern = fitting(grad), ctx.pattern
        make = torch.empty if q.numel() else torch.zeros
        grad_q, grad_k, grad_v = (make(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        own_k, own_v = (make(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)) if ctx.remembers else NOTHING
        if q.numel():
            allow_descriptors()
            delta = torch.empty_like(log_sum)
            numbers = _numbers(q, k, v, grad, pattern)
            _, by_queries, by_keys = tiles(q)
            grad_queries[_grid(q, by_queries.queries)](
                q, k, v, grad, out, log_sum, delta, grad_q, *bounds, pattern.slopes, *numbers,
                **_options(q, k, pattern, by_queries),
            )
            launches = [(grad_k, grad_v, *bounds)]
            if ctx.remembers:  # once more over the keys of the own block
                launches.append((own_k, own_v, *_bounds(pattern.without_memory)))
            for made in launches:
                grad_keys[_grid(k, by_keys.keys)](
                    q, k, v, grad, log_sum, delta, *made, pattern.slopes, *numbers,
                    **_options(q, k, pattern, by_keys),
                )
        if own_k is None or own_v is None:
            return grad_q, grad_k, grad_v, None, None, None
        return grad_q, own_k, own_v, None, grad_k - own_k, grad_v - own_v


def tiles(q: Tensor) -> tuple[AttentionTile, AttentionTile, AttentionTile]:
    """Choose tile sizes that spill no registers on sm_90.

    q: [batch, seq_q, heads, head_dim]. -> for the output, for the gradient of q, and for those of k and v
    """
    if q.device.type == "cpu":
        return (AttentionTile(32, 32, 4, 1),) * 3  # small, so that short sequences have many
    if q.dtype == torch.float32:
        if q.shape[3] > 128:
            return (AttentionTile(32, 16, 8, 1),) * 3
        return (AttentionTile(32, 32, 8, 1),) * 3
    if q.shape[3] > 128:
        return AttentionTile(128, 32, 8, 1), AttentionTile(64, 32, 8, 2), AttentionTile(32, 32, 8, 1)
    if q.shape[3] > 64:
        stages = 3 if shared_bytes(q) >= 100 * 1024 else 2  # a desktop's GPU lacks 1 KB for three
        return AttentionTile(64, 64, 4, 3), AttentionTile(128, 64, 8, stages), AttentionTile(64, 64, 4, 2)
    return AttentionTile(64, 128, 4, 2), AttentionTile(128, 64, 8, 3), AttentionTile(64, 64, 4, 2)


def _grid(x: Tensor, rows: int) -> tuple[int, int, int]:
    """Lay out the programs so that tiles of one head run one after another and share keys in the cache."""
    return triton.cdiv(x.shape[1], rows), x.shape[2], x.shape[0]


def _bounds(pattern: AttentionPattern) -> tuple[Tensor | None, Tensor | None]:
    """Find each query's first key and each key's last query, windows apart. -> [batch, seq_k] int32 each, or None"""
    if pattern.positions is None:
        return None, None
    first, last = pattern.bounds()
    return first.int(), last.int()


def _numbers(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, pattern: AttentionPattern) -> list[int | float]:
    """List the kernels' numeric arguments: strides of batch, position and head, sizes, window, scale."""
    strides = [stride for x in (q, k, v, grad) for stride in x.stride()[:3]]
    return [*strides, q.shape[1], k.shape[1], pattern.window or 0, pattern.scale]


def _options(q: Tensor, k: Tensor, pattern: AttentionPattern, tile: AttentionTile) -> dict[str, Any]:
    """List the constants that kernels are compiled for."""
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    return {
        "GROUP": q.shape[2] // k.shape[2], "D": q.shape[3], "BLOCK_D": block_d,
        "SLICE": min(32, block_d) if q.dtype == torch.float32 else block_d,
        "BLOCK_M": tile.queries, "BLOCK_N": tile.keys, "CAUSAL": pattern.causal,
        "WINDOW": pattern.window is not None, "DOCUMENTS": pattern.positions is not None,
        "ALIBI": pattern.slopes is not None, "UPCAST": q.device.type == "cpu",
        "num_warps": tile.warps, "num_stages": tile.stages,
    }
