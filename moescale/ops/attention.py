"""Exact attention: causal, windowed, over documents, with grouped heads and linear biases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
BLOCK = 64  # queries; 32 takes a twentieth less on two cores and leaves many cores idle, 128 a tenth more
LONG = 1024  # positions beyond which torch's causal kernel skips as much as blocks would


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    positions: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    backend: Literal["auto", "sdpa", "reference"] = "auto",
) -> Tensor:
    """Let each position attend to itself and those before it, in its window and its document.

    q: [batch, seq_q, heads, head_dim], the queries of the last seq_q of the keys' positions.
    k, v: [batch, seq_k, kv_heads, head_dim]; each key head serves heads / kv_heads.
    window: positions that a query sees, itself included. positions: [batch, seq_k] int64, restart at 0 with a document.
    alibi_slopes: [heads] float32, how much a score loses with each position that the key lies behind (ALiBi, sec. 3).
    -> [batch, seq_q, heads, head_dim]
    """
    seq_q, seq_k = q.shape[1], k.shape[1]
    assert seq_q <= seq_k, f"{seq_q} queries do not fit the positions of {seq_k} keys"
    if backend == "reference":
        return _reference(q, k, v, window, positions, alibi_slopes)
    documents = positions if _has_documents(positions) else None
    masked = seq_q < seq_k or (window is not None and window < seq_k) or documents is not None
    masked = masked or alibi_slopes is not None
    if backend == "auto" and q.device.type == "cpu" and (masked or seq_k <= LONG):
        return _Blocks.apply(q, k, v, window, documents, alibi_slopes)
    mask = None
    if masked:  # [batch or 1, heads or 1, seq_q, seq_k]
        mask = visible(seq_q, seq_k, window, documents, q.device).unsqueeze(-3)
        mask = mask if alibi_slopes is None else _bias(mask, alibi_slopes, q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )  # [batch, heads, seq_q, head_dim]
    return out.transpose(1, 2)


def visible(seq_q: int, seq_k: int, window: int | None, positions: Tensor | None, device: torch.device) -> Tensor:
    """Say which keys each query sees. -> [seq_q, seq_k] bool, or [batch, seq_q, seq_k] where there are documents"""
    index = torch.arange(seq_k, device=device)
    behind = index[seq_k - seq_q :].unsqueeze(1) - index  # how far the key lies behind the query
    mask = behind >= 0
    if window is not None:
        mask &= behind < window
    if positions is not None:
        document = (positions == 0).cumsum(1)
        mask = mask & (document[:, seq_k - seq_q :].unsqueeze(2) == document.unsqueeze(1))
    return mask


def _bias(sees: Tensor, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What to add to the scores. sees: [..., seq_q, seq_k] bool. slopes: [heads]. -> of the same shape, by head"""
    if slopes is None:
        return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, float("-inf"))
    seq_q, seq_k = sees.shape[-2:]
    index = torch.arange(seq_k, device=sees.device)
    behind = index[seq_k - seq_q :].unsqueeze(1) - index
    return (-slopes.to(dtype).view(-1, 1, 1) * behind).masked_fill(~sees, float("-inf"))


def _has_documents(positions: Tensor | None) -> bool:
    if positions is None:
        return False
    if positions.device.type != "cpu":
        return True  # looking would make the host wait for the device
    return bool((positions[:, 1:] == 0).any())


def _reference(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, positions: Tensor | None, slopes: Tensor | None
) -> Tensor:
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
    mask = visible(q.shape[1], k.shape[1], window, positions, q.device)
    mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    probs = (scores + _bias(mask, slopes, scores.dtype)).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v)


class _Blocks(torch.autograd.Function):
    """On a processor: torch's own kernel, block of queries by block, each with the keys alone that it can see.

    The kernel works in float32 for bfloat16 too: on processors its bfloat16 backward takes twice the time.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, positions: Tensor | None, slopes: Tensor | None
    ) -> Tensor:
        wide_q, wide_k, wide_v = _wide(q), _wide(k), _wide(v)
        out = torch.empty(q.shape, dtype=q.dtype)
        logs = wide_q.new_empty(q.shape[:3])
        for rows, keys, mask in _blocks(q.shape[1], k.shape[1], window, positions, slopes, wide_q.dtype):
            part, log = aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(wide_q, rows), _heads_first(wide_k, keys), _heads_first(wide_v, keys), attn_mask=mask
            )  # [batch, heads, rows, head_dim], [batch, heads, rows]
            out[:, rows] = part.transpose(1, 2)
            logs[:, rows] = log.transpose(1, 2)
        ctx.window = window
        ctx.save_for_backward(q, k, v, out, logs, positions, slopes)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, out, logs, positions, slopes = ctx.saved_tensors
        wide_q, wide_k, wide_v, wide_out, grad = _wide(q), _wide(k), _wide(v), _wide(out), _wide(grad)
        grad_q = torch.empty(q.shape, dtype=q.dtype)
        grad_k, grad_v = torch.zeros(k.shape, dtype=wide_q.dtype), torch.zeros(v.shape, dtype=wide_q.dtype)
        for rows, keys, mask in _blocks(q.shape[1], k.shape[1], ctx.window, positions, slopes, wide_q.dtype):
            of_q, of_k, of_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(grad, rows), _heads_first(wide_q, rows), _heads_first(wide_k, keys),
                _heads_first(wide_v, keys), _heads_first(wide_out, rows), _heads_first(logs, rows), 0.0, False,
                attn_mask=mask,
            )
            grad_q[:, rows] = of_q.transpose(1, 2)
            grad_k[:, keys] += of_k.transpose(1, 2)
            grad_v[:, keys] += of_v.transpose(1, 2)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _blocks(
    seq_q: int, seq_k: int, window: int | None, positions: Tensor | None, slopes: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor]]:
    """-> for each block of queries: its rows, the keys that one of them can see, what to add to the scores."""
    first, mask = _first_keys(seq_q, seq_k, window, positions), torch.empty(0)
    for start in range(0, seq_q, BLOCK):
        stop = min(start + BLOCK, seq_q)
        keys = slice(first[start], seq_k - seq_q + stop)
        shape = (stop - start, keys.stop - keys.start)
        if positions is not None or mask.shape[-2:] != shape:  # without documents, one shape has one mask
            sees = visible(*shape, window, None if positions is None else positions[:, keys], torch.device("cpu"))
            mask = _bias(sees.unsqueeze(-3), slopes, dtype)
            mask = mask if mask.ndim == 4 else mask.unsqueeze(0)
        yield slice(start, stop), keys, mask


def _first_keys(seq_q: int, seq_k: int, window: int | None, positions: Tensor | None) -> list[int]:
    """-> for each query, before which key no query of any sequence looks, from there on."""
    index = torch.arange(seq_k)
    first = torch.zeros_like(index) if window is None else (index - window + 1).clamp(min=0)
    if positions is not None:
        document = torch.where(positions == 0, index, 0).cummax(1).values  # [batch, seq_k], where it began
        first = torch.maximum(first, document.amin(0))
    return first[seq_k - seq_q :].tolist()


def _heads_first(x: Tensor, of: slice) -> Tensor:
    return x[:, of].transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least, and features side by side: the kernel takes their stride to be 1 and does not look."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if x.stride(-1) == 1 else x.contiguous()
