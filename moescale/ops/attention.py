"""Exact attention: causal, windowed, over documents, with grouped heads and linear biases."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.attention_blocks import attention_in_blocks
from moescale.ops.attention_chunked import chunked_attention
from moescale.ops.attention_pattern import AttentionPattern
from moescale.ops.device import TRITON, triton_runs

SHORT = 128  # queries up to which one call of torch's kernel takes less than calls for blocks, on a processor
LONG = 1024  # positions beyond which torch's causal kernel wins in bfloat16 too, on a processor that has it
log = logging.getLogger(__name__)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
    backend: Literal["auto", "triton", "sdpa", "flex", "chunked", "reference"] = "auto",
) -> Tensor:
    """Compute exact attention within documents, optionally causal and limited to a window.

    q: [batch, seq_q, heads, head_dim], the queries of the last seq_q of the keys' positions.
    k, v: [batch, seq_k, kv_heads, head_dim]; each key head serves heads / kv_heads query heads.
    window: number of positions that a query sees, itself included.
    positions: [batch, seq_k] int64, restart at 0 with a document.
    alibi_slopes: [heads] float32, what a score loses per position between query and key (ALiBi, sec. 3).
    scale: factor of the scores, by default head_dim ** -0.5. backend: `auto` takes the fastest; all are exact.
    -> [batch, seq_q, heads, head_dim]. Raises ValueError when a backend cannot do what is asked.
    """
    seq_q, seq_k = q.shape[1], k.shape[1]
    assert seq_q <= seq_k, f"{seq_q} queries do not fit the positions of {seq_k} keys"
    if window is not None and not causal:
        raise ValueError("window says how far back a query sees: use it with causal=True")
    window = None if window is None or window >= seq_k else window
    documents = positions if _has_documents(positions) else None
    pattern = AttentionPattern(causal, window, documents, alibi_slopes, q.shape[3] ** -0.5 if scale is None else scale)
    name: str = backend
    if backend == "auto":
        name, why = _fastest(q, seq_k, pattern)
        _say_once(name, why)
    return _BACKENDS[name](q, k, v, pattern)


def _fastest(q: Tensor, seq_k: int, pattern: AttentionPattern) -> tuple[str, str]:
    """Choose a backend for these shapes and this device. -> its name, and the reason for the log"""
    seq_q, hides = q.shape[1], pattern.window is not None or pattern.positions is not None
    plain = not hides and pattern.slopes is None and seq_q == seq_k
    if q.device.type == "cpu":
        few = seq_q <= SHORT and not (hides and seq_k > LONG)
        if not pattern.causal or (few and seq_q < seq_k):
            return "sdpa", "on a processor, torch's kernel is the fastest where nothing can be skipped"
        if q.dtype == torch.bfloat16 and not (plain and seq_k > LONG):
            return "blocks", "on a processor, torch's kernel is slow in bfloat16, and blocks work in float32"
        if not plain and not few:
            return "blocks", "on a processor, blocks skip what queries do not see"
        return "sdpa", "on a processor, torch's kernel is the fastest where little can be skipped"
    if plain:
        return "sdpa", "the vendor's kernels know no faster one without window, documents and biases"
    if triton_runs(q) and _fits_triton(q):
        return "triton", "tiles that a window or documents hide are skipped, biases need no memory"
    return "sdpa", "no kernel of ours runs here"


@cache
def _say_once(name: str, why: str) -> None:
    log.debug("attention backend %s: %s", name, why)


def _has_documents(positions: Tensor | None) -> bool:
    if positions is None:
        return False
    if positions.device.type != "cpu":
        return True  # looking would make the host wait for the device
    return bool((positions[:, 1:] == 0).any())


def _fits_triton(q: Tensor) -> bool:
    return q.dtype != torch.float64 and 16 <= q.shape[3] <= 256


def _triton(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    if not TRITON:
        raise ValueError("backend=triton needs the package triton: pip install triton, or use backend=auto")
    if not _fits_triton(q):
        raise ValueError("backend=triton takes head_dim 16 to 256, no float64: use backend=auto")
    from moescale.ops.attention_triton import flash_attention

    return flash_attention(q, k, v, pattern)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    seq_q, seq_k = q.shape[1], k.shape[1]
    mask = None
    square = seq_q == seq_k or not pattern.causal
    if not square or pattern.window is not None or pattern.positions is not None or pattern.slopes is not None:
        whole = slice(0, seq_q), slice(0, seq_k), seq_q, seq_k
        if pattern.slopes is None:
            mask = pattern.visible(*whole, q.device)
            mask = mask if mask.ndim == 2 else mask.unsqueeze(1)  # of three dimensions, torch takes no fused kernel
        else:
            mask = pattern.bias(*whole, q.dtype, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
        is_causal=pattern.causal and mask is None, scale=pattern.scale, enable_gqa=q.shape[2] != k.shape[2],
    )  # [batch, heads, seq_q, head_dim]
    return out.transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    if q.device.type != "cuda":
        raise ValueError("backend=flex has no backward on a processor: use backend=auto")
    return flex(q, k, v, pattern, _compiled_flex())


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, flex_attention: Any) -> Tensor:
    """Express the pattern in the terms of torch's FlexAttention.

    q, k, v: as in `attention`. flex_attention: torch's function, compiled or not. -> like q
    """
    from torch.nn.attention.flex_attention import create_block_mask

    shift = k.shape[1] - q.shape[1]
    document = None if pattern.positions is None else (pattern.positions == 0).cumsum(1)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        behind = query + shift - key
        seen = behind >= 0 if pattern.causal else behind == behind
        if pattern.window is not None:
            seen = seen & (behind < pattern.window)
        return seen if document is None else seen & (document[batch, query + shift] == document[batch, key])

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert pattern.slopes is not None
        return score - pattern.slopes[head] * (query + shift - key).abs()

    mask = create_block_mask(sees, len(q) if document is not None else None, None, q.shape[1], k.shape[1], q.device)
    out = flex_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, scale=pattern.scale,
        score_mod=None if pattern.slopes is None else biased, enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    seq_q, seq_k, repeats = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * pattern.scale
    bias = pattern.bias(slice(0, seq_q), slice(0, seq_k), seq_q, seq_k, scores.dtype, q.device)
    return torch.einsum("bhqk,bkhd->bqhd", (scores + bias).softmax(-1), v)


_BACKENDS = {
    "triton": _triton, "sdpa": _sdpa, "flex": _flex, "chunked": chunked_attention, "blocks": attention_in_blocks,
    "reference": _reference,
}
