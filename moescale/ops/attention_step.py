"""Attention of one new token a row, over keys that lie in any order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moescale.ops.attention_pattern import Visibility


def attention_step(
    q: Tensor, k: Tensor, v: Tensor, age: Tensor, positions: Tensor, alibi_slopes: Tensor | None, visibility: Visibility
) -> Tensor:
    """Let the newest token of each row attend to the keys of its document that it sees.

    q: [batch, 1, heads, head_dim]. k, v: [batch, kv_heads, keys, head_dim]; each key head serves heads / kv_heads.
    age: [keys] or [batch, keys] int64, how many tokens came after this key; 0 is the token itself, and what is negative
    is not seen. positions: [batch, 1] int64, the token's place in its document. alibi_slopes: [heads] float32. Returns
    features like q.
    """
    sees = visibility.sees(age, positions).view(len(q), 1, 1, -1)  # older keys are of other documents, or padding
    grouped = q.view(len(q), k.shape[1], -1, q.shape[3])  # the heads that a key head serves are its queries
    if alibi_slopes is None:
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=sees).view_as(q)
    dtype = torch.promote_types(q.dtype, torch.float32)  # distances are whole numbers beyond bfloat16's
    distance = age.view(-1, 1, 1, age.shape[-1])
    bias = (-alibi_slopes.to(dtype).view(1, k.shape[1], -1, 1) * distance).masked_fill(~sees, float("-inf"))
    out = F.scaled_dot_product_attention(grouped.to(dtype), k.to(dtype), v.to(dtype), attn_mask=bias)
    return out.to(q.dtype).view_as(q)
