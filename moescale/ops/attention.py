"""Exact attention: causal, windowed, over documents, with grouped heads."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    positions: Tensor | None = None,
    backend: Literal["auto", "sdpa", "reference"] = "auto",
) -> Tensor:
    """Let each position attend to itself and those before it, in its window and its document.

    q: [batch, seq, heads, head_dim]. k, v: [batch, seq, kv_heads, head_dim]; each key head serves heads / kv_heads.
    window: positions that a query sees, itself included. positions: [batch, seq] int64, restart at 0 with a document.
    -> [batch, seq, heads, head_dim]
    """
    if backend == "reference":
        return _reference(q, k, v, window, positions)
    mask = None
    if (window is not None and window < k.shape[1]) or _has_documents(positions) or q.shape[1]!=k.shape[1]:
        mask = visible(k.shape[1], window, positions, q.device).unsqueeze(-3)[..., -q.shape[1]:, :]  # [batch or 1, 1, seq, seq]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )  # [batch, heads, seq, head_dim]
    return out.transpose(1, 2)


def visible(seq: int, window: int | None, positions: Tensor | None, device: torch.device) -> Tensor:
    """Say which keys each query sees. -> [seq, seq] bool, or [batch, seq, seq] where there are documents"""
    index = torch.arange(seq, device=device)
    behind = index.unsqueeze(1) - index  # how far the key lies behind the query
    mask = behind >= 0
    if window is not None:
        mask &= behind < window
    if positions is not None:
        document = (positions == 0).cumsum(1)
        mask = mask & (document.unsqueeze(2) == document.unsqueeze(1))
    return mask


def _has_documents(positions: Tensor | None) -> bool:
    if positions is None:
        return False
    if positions.device.type != "cpu":
        return True  # looking would make the host wait for the device
    return bool((positions[:, 1:] == 0).any())


def _reference(q: Tensor, k: Tensor, v: Tensor, window: int | None, positions: Tensor | None) -> Tensor:
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
    mask = visible(q.shape[1], window, positions, q.device)
    mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    probs = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v)
