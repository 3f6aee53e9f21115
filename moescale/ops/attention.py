"""Exact attention: causal, in windows, blocks and steps, over documents, with grouped heads and linear biases."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.attention_blocks import attention_in_blocks
from moescale.ops.attention_chunked import chunked_attention
from moescale.ops.attention_compiled import attention_compiled, fits_compiled
from moescale.ops.attention_pattern import (
    NOTHING,
    AttentionPattern,
    Remembered,
    Visibility,
    for_heads,
)
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
    dilation: int = 1,
    block_size: int | None = None,
    global_tokens: int = 0,
    memory: int = 0,
    remembered: Remembered = NOTHING,
    alibi_slopes: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
    backend: Literal["auto", "triton", "compiled", "sdpa", "flex", "chunked", "reference"] = "auto",
) -> Tensor:
    """Compute exact attention within documents, optionally causal and limited to a part of the past.

    q: [batch, seq_q, heads, head_dim], the queries of the last seq_q of the keys' positions.
    k, v: [batch, seq_k, kv_heads, head_dim]; each key head serves heads / kv_heads query heads.
    window, dilation, block_size, global_tokens, memory: which of the past a query sees, as `Visibility` says.
    remembered: keys and values with the values of k and v, for memory: gradients of queries of later blocks go to them,
    and those of queries of the same block to k and v. Without them, all go to k and v.
    positions: [batch, seq_k] int64, restart at 0 with a document.
    alibi_slopes: [heads] float32, what a score loses per position between query and key (ALiBi, sec. 3).
    scale: factor of the scores, by default head_dim ** -0.5. backend: `auto` takes the fastest; all are exact.
    -> [batch, seq_q, heads, head_dim]. Raises ValueError when a backend cannot do what is asked.
    """
    seq_q, seq_k = q.shape[1], k.shape[1]
    assert seq_q <= seq_k, f"{seq_q} queries do not fit the positions of {seq_k} keys"
    visibility = Visibility(window, dilation, block_size, global_tokens, memory)
    if visibility != Visibility() and not causal:
        raise ValueError("window, dilation, block, global_tokens and memory say what of the past a query sees: "
                         "use them with causal=True")
    if memory and (block_size is None or visibility != Visibility(block_size=block_size, memory=memory)):
        raise ValueError("memory is what lies before a block: use it with block_size alone")
    if block_size is not None and positions is None:
        positions = torch.arange(seq_k, device=q.device).expand(len(q), -1)
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        if backend not in ("auto", "sdpa", "reference"):
            raise ValueError(f"backend={backend} gives alibi_slopes no gradient: use backend=auto, or detach them")
        backend = "reference" if backend == "reference" else "sdpa"
    pattern = AttentionPattern(
        causal, visibility, positions, alibi_slopes, q.shape[3] ** -0.5 if scale is None else scale)
    if backend == "reference":
        return _reference(q, k, v, pattern, remembered)
    if global_tokens or (memory and _has_memory(pattern)):  # whose documents are whole
        return _attend(q, k, v, pattern, backend, remembered)
    # A block is a document within a document, and every dilation-th position a sequence of its own.
    if block_size is not None and positions is not None:
        pattern = replace(pattern, visibility=replace(visibility, block_size=None, memory=0),
                          positions=positions % block_size)
    return _attend_by_residue(q, k, v, pattern, backend) if dilation > 1 else _attend(q, k, v, pattern, backend)


def _attend_by_residue(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, backend: str) -> Tensor:
    """Let positions attend to those whose number leaves the same residue: what lies between is never looked at."""
    step, seq_q, batch = pattern.visibility.dilation, q.shape[1], len(q)
    after = -k.shape[1] % step  # zeros that make all residues equally many; no query sees those after it
    before = -(seq_q + after) % step  # queries whose outputs are left out

    def apart(x: Tensor, first: int) -> Tensor:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (first, after))
        return x.unflatten(1, (-1, step)).transpose(1, 2).flatten(0, 1)

    slopes = pattern.slopes
    if slopes is not None:
        slopes = slopes.to(torch.promote_types(q.dtype, torch.float32)) * step
    pattern = replace(
        pattern, visibility=replace(pattern.visibility, dilation=1), slopes=slopes,
        positions=None if pattern.positions is None else apart(pattern.positions, 0) // step,
    )
    out = _attend(apart(q, before), apart(k, 0), apart(v, 0), pattern, backend)
    out = out.unflatten(0, (batch, step)).transpose(1, 2).flatten(1, 2)
    return out[:, before : before + seq_q]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, name: str, remembered: Remembered = NOTHING
) -> Tensor:
    """Run a backend, or the fastest one, without hiding what is not there."""
    seen, seq_k = pattern.visibility, k.shape[1]
    if seen.window is not None and seen.window * seen.dilation >= seq_k:
        seen = replace(seen, window=None)
    if seen == Visibility(global_tokens=seen.global_tokens):
        seen = Visibility()
    documents = pattern.positions
    if documents is not None and seen.block_size is None and not seen.global_tokens and not _has_documents(documents):
        documents = None
    pattern = replace(pattern, visibility=seen, positions=documents)
    if name == "auto":
        name, why = _fastest(q, k, v, pattern)
        _say_once(name, why)
    return _BACKENDS[name](q, k, v, pattern, remembered)


def _fastest(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> tuple[str, str]:
    """Choose a backend for these shapes and this device. -> its name, and the reason for the log"""
    seq_q, seq_k = q.shape[1], k.shape[1]
    hides = pattern.visibility != Visibility() or pattern.positions is not None
    plain = not hides and pattern.slopes is None and seq_q == seq_k
    if q.device.type == "cpu":
        few = seq_q <= SHORT and not (hides and seq_k > LONG)
        if not pattern.causal or (few and seq_q < seq_k):
            return "sdpa", "on a processor, torch's kernel is the fastest where nothing can be skipped"
        if fits_compiled(q, k, v, pattern) and 2 * len(k) * k.shape[2] >= torch.get_num_threads():
            return "compiled", "on a processor with a compiler, no product is made that a query does not see"
        if q.dtype == torch.bfloat16 and not (plain and seq_k > LONG):
            return "blocks", "on a processor, torch's kernel is slow in bfloat16, and blocks work in float32"
        if not plain and not few:
            return "blocks", "on a processor, blocks skip what queries do not see"
        return "sdpa", "on a processor, torch's kernel is the fastest where little can be skipped"
    if plain:
        return "sdpa", "the vendor's kernels know no faster one without window, documents and biases"
    if pattern.visibility.global_tokens:
        return "sdpa", "no kernel of ours knows global tokens"
    if triton_runs(q) and _fits_triton(q):
        return "triton", "tiles that a window or documents hide are skipped, biases need no memory"
    return "sdpa", "no kernel of ours runs here"


@cache
def _say_once(name: str, why: str) -> None:
    log.debug("attention backend %s: %s", name, why)


def _has_documents(positions: Tensor) -> bool:
    if positions.device.type != "cpu":
        return True  # looking would make the host wait for the device
    return bool((positions[:, 1:] == 0).any())


def _has_memory(pattern: AttentionPattern) -> bool:
    positions, size = pattern.positions, pattern.visibility.block_size
    assert positions is not None
    assert size is not None
    if positions.device.type != "cpu":
        return True  # looking would make the host wait for the device
    return bool((positions >= size).any())


def _fits_triton(q: Tensor) -> bool:
    return q.dtype != torch.float64 and 16 <= q.shape[3] <= 256


def _triton(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, remembered: Remembered) -> Tensor:
    if not TRITON:
        raise ValueError("backend=triton needs the package triton: pip install triton, or use backend=auto")
    if not _fits_triton(q):
        raise ValueError("backend=triton takes head_dim 16 to 256, no float64: use backend=auto")
    if pattern.visibility.global_tokens:
        raise ValueError("backend=triton knows no global tokens: use backend=auto")
    from moescale.ops.attention_triton import flash_attention

    return flash_attention(q, k, v, pattern, remembered)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, remembered: Remembered) -> Tensor:
    seq_q, seq_k = q.shape[1], k.shape[1]
    mask = None
    square = seq_q == seq_k or not pattern.causal
    hides = pattern.visibility != Visibility() or pattern.positions is not None
    if not square or hides or pattern.slopes is not None:
        key = torch.arange(seq_k, device=q.device)
        if pattern.slopes is None:
            mask = pattern.visible(key[seq_k - seq_q :], key)
            mask = mask if mask.ndim == 2 else mask.unsqueeze(1)  # of three dimensions, torch takes no fused kernel
        else:
            mask = pattern.bias(key[seq_k - seq_q :], key, q.dtype)
        k, v, mask = _beside(k, v, mask, pattern, seq_q, remembered)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
        is_causal=pattern.causal and mask is None, scale=pattern.scale, enable_gqa=q.shape[2] != k.shape[2],
    )  # [batch, heads, seq_q, head_dim]
    return out.transpose(1, 2)


def _beside(
    k: Tensor, v: Tensor, mask: Tensor, pattern: AttentionPattern, seq_q: int, remembered: Remembered
) -> tuple[Tensor, Tensor, Tensor]:
    """Put what is remembered beside the keys and values, each seen where the mask lets it and the block says so.

    mask: [batch or 1, heads or 1, seq_q, seq_k] or without the first two, bool or what is added to the scores.
    """
    memory_k, memory_v = remembered
    if memory_k is None or memory_v is None:
        return k, v, mask
    key = torch.arange(k.shape[1], device=k.device)
    own = for_heads(pattern.without_memory.visible(key[k.shape[1] - seq_q :], key))
    hidden = False if mask.dtype == torch.bool else float("-inf")
    mask = torch.cat((mask.masked_fill(~own, hidden), mask.masked_fill(own, hidden)), -1)
    return torch.cat((k, memory_k), 1), torch.cat((v, memory_v), 1), mask


def _compiled_on_processor(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, remembered: Remembered
) -> Tensor:
    if not fits_compiled(q, k, v, pattern):
        raise ValueError("backend=compiled needs a processor, a C++ compiler, causal=True, keys side by side, head_dim "
                         "divisible by 16, float32 or bfloat16: use backend=auto")
    return attention_compiled(q, k, v, pattern)


def _flex(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, remembered: Remembered) -> Tensor:
    if remembered[0] is not None:
        raise ValueError("backend=flex cannot keep gradients from memory: use backend=auto")
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
    positions = pattern.positions
    document = None if positions is None else (positions == 0).cumsum(1)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query = query + shift
        if pattern.causal:
            return pattern.visibility.sees(query - key, query if positions is None else positions[batch, query])
        return key >= 0 if document is None else document[batch, query] == document[batch, key]

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert pattern.slopes is not None
        return score - pattern.slopes[head] * (query + shift - key).abs()

    mask = create_block_mask(sees, len(q) if document is not None else None, None, q.shape[1], k.shape[1], q.device)
    out = flex_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, scale=pattern.scale,
        score_mod=None if pattern.slopes is None else biased, enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, remembered: Remembered = NOTHING
) -> Tensor:
    seq_q, seq_k, repeats = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    key = torch.arange(seq_k, device=q.device)
    bias = pattern.bias(key[seq_k - seq_q :], key, q.dtype)
    k, v, bias = _beside(k, v, bias, pattern, seq_q, remembered)
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * pattern.scale
    return torch.einsum("bhqk,bkhd->bqhd", (scores + bias).softmax(-1), v)


_BACKENDS = {
    "triton": _triton, "sdpa": _sdpa, "flex": _flex, "chunked": chunked_attention, "blocks": attention_in_blocks,
    "compiled": _compiled_on_processor, "reference": _reference,
}
