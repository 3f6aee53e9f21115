"""Causal attention on a processor, by functions that are compiled on this machine: see native_attention.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moescale.ops import native
from moescale.ops.attention_pattern import AttentionPattern, Visibility

LANES = 16  # of which head_dim must be a multiple


def fits_compiled(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> bool:
    """Say whether these functions can compute it: causal, of float32 or bfloat16, over keys that lie side by side."""
    return (
        pattern.causal and pattern.visibility == Visibility(pattern.window) and q.shape[3] % LANES == 0
        and k.shape == v.shape and len(q) == len(k) and q.shape[3] == k.shape[3] and q.shape[2] % k.shape[2] == 0
        and q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.bfloat16)
        and all(map(native.runs, (q, k, v)))
    )


def attention_compiled(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    """Compute causal attention, where `fits_compiled` says so. q, k, v, pattern: as in `attention`. -> like q"""
    return _Compiled.apply(q, k, v, pattern)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, log_sum = torch.empty_like(q), q.new_empty(len(q), q.shape[2], q.shape[1], dtype=torch.float32)
        slopes = None if pattern.slopes is None else pattern.slopes.float().contiguous()
        ctx.scale, first = pattern.scale, pattern.first_keys(q.shape[1], k.shape[1]).contiguous()
        native.call("attend", q.dtype, *_arguments(q, k, v, first, slopes, pattern.scale), out, log_sum)
        ctx.save_for_backward(q, k, v, first, slopes, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first, slopes, out, log_sum = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        native.call("attend_backward", q.dtype, *_arguments(q, k, v, first, slopes, ctx.scale), out, log_sum,
                    grad.contiguous(), *grads)
        return *grads, None


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, slopes: Tensor | None, scale: float
) -> tuple[Tensor | float | None, ...]:
    """List what both passes begin with. first: [batch or 1, seq_q] int64, the first key that each query sees"""
    batch, seq_q, heads, head_dim = q.shape
    return (torch.get_num_threads(), q, k, v, first, seq_q if len(first) > 1 else 0, slopes, float(scale), batch, seq_q,
            k.shape[1], heads, k.shape[2], head_dim)
