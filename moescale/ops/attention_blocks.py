"""Causal attention on a processor: torch's own kernel per block of queries, with the keys that the block sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moescale.ops.attention_pattern import NOTHING, AttentionPattern, Remembered

aten = torch.ops.aten
BLOCK = 64  # queries; 32 takes a twentieth less on two cores and leaves many cores idle, 128 a tenth more


def attention_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, remembered: Remembered = NOTHING
) -> Tensor:
    """Compute causal attention, skipping the keys that are out of reach or in other documents.

    q, k, v, pattern, remembered: as in `attention`, causal, on the CPU. -> like q
    bfloat16 is computed in float32: on processors the kernel's bfloat16 backward takes twice the time.
    """
    return _Blocks.apply(q, k, v, pattern, *remembered)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, memory_k: Tensor | None,
        memory_v: Tensor | None,
    ) -> Tensor:
        upcast_q, upcast_k, upcast_v = _upcast(q), _upcast(k), _upcast(v)
        out = torch.empty(q.shape, dtype=q.dtype)
        log_sum = upcast_q.new_empty(q.shape[:3])
        for queries, keys, mask in _blocks(q, k, pattern, upcast_q.dtype):
            block_out, block_log_sum = aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(upcast_q, queries), keys.take(upcast_k), keys.take(upcast_v),
                attn_mask=mask, scale=pattern.scale,
            )  # [batch, heads, queries, head_dim], [batch, heads, queries]
            out[:, queries] = block_out.transpose(1, 2)
            log_sum[:, queries] = block_log_sum.transpose(1, 2)
        ctx.pattern, ctx.remembers = pattern, memory_k is not None
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        grad_q, grad_k, grad_v = _gradients(grad, q, k, v, out, log_sum, ctx.pattern)
        if not ctx.remembers:
            return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None
        # Once more over the keys of the own block: what is left is of queries of later blocks.
        _, own_k, own_v = _gradients(grad, q, k, v, out, log_sum, ctx.pattern.without_memory)
        return (grad_q, own_k.to(k.dtype), own_v.to(v.dtype), None, (grad_k - own_k).to(k.dtype),
                (grad_v - own_v).to(v.dtype))


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, pattern: AttentionPattern
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients that pass between the queries and the keys that they see.

    grad: of the outputs. Returns those of q, k and v, the latter two upcast.
    """
    upcast_q, upcast_k, upcast_v, upcast_out = _upcast(q), _upcast(k), _upcast(v), _upcast(out)
    grad = _upcast(grad)
    grad_q = torch.empty(q.shape, dtype=q.dtype)
    # Blocks share keys, so that the gradients of keys and values accumulate, in the upcast dtype.
    grad_k, grad_v = torch.zeros(k.shape, dtype=upcast_q.dtype), torch.zeros(v.shape, dtype=upcast_q.dtype)
    for queries, keys, mask in _blocks(q, k, pattern, upcast_q.dtype):
        block_grad_q, block_grad_k, block_grad_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(grad, queries), _heads_first(upcast_q, queries), keys.take(upcast_k),
            keys.take(upcast_v), _heads_first(upcast_out, queries), _heads_first(log_sum, queries),
            0.0, False, attn_mask=mask, scale=pattern.scale,
        )
        grad_q[:, queries] = block_grad_q.transpose(1, 2)
        keys.accumulate(grad_k, block_grad_k)
        keys.accumulate(grad_v, block_grad_v)
    return grad_q, grad_k, grad_v


@dataclass(frozen=True)
class _Keys:
    """Keys of a block of queries: those of a stretch and, before it, global tokens, of other places in each row.

    stretch: places. tokens: None, or their places, [batch, tokens] int64, of which those within the stretch are hidden.
    """

    stretch: slice
    tokens: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """[batch, seq, heads, head_dim] -> [batch, heads, keys, head_dim]"""
        if self.tokens is None:
            return _heads_first(x, self.stretch)
        return torch.cat((x.gather(1, self._features(x)), x[:, self.stretch]), 1).transpose(1, 2)

    def accumulate(self, grad: Tensor, block_grad: Tensor) -> None:
        """grad: [batch, seq, heads, head_dim]. block_grad: [batch, heads, keys, head_dim]"""
        block_grad = block_grad.transpose(1, 2)
        if self.tokens is not None:
            number = self.tokens.shape[1]
            grad.scatter_add_(1, self._features(grad), block_grad[:, :number])
            block_grad = block_grad[:, number:]
        grad[:, self.stretch] += block_grad

    def _features(self, x: Tensor) -> Tensor:
        assert self.tokens is not None
        return self.tokens[:, :, None, None].expand(-1, -1, *x.shape[2:])


def _blocks(
    q: Tensor, k: Tensor, pattern: AttentionPattern, dtype: torch.dtype
) -> Iterator[tuple[slice, _Keys, Tensor]]:
    """Walk the blocks of queries. -> for each: its queries, the keys that any of them sees, the bias of the scores"""
    seq_q, seq_k = q.shape[1], k.shape[1]
    place, mask = torch.arange(seq_k), torch.empty(0)
    first = pattern.first_keys(seq_q, seq_k).amin(0).tolist()  # that any sequence sees
    for start in range(0, seq_q, BLOCK):
        queries = slice(start, min(start + BLOCK, seq_q))
        stretch = slice(first[start], seq_k - seq_q + queries.stop)
        query, key = place[seq_k - seq_q :][queries], place[stretch]
        tokens = pattern.global_keys(stretch.start, place.device)
        if tokens is not None:
            tokens = tokens.expand(len(q), -1)
            mask = pattern.bias(query, torch.cat((tokens, key.expand(len(q), -1)), 1), dtype)
            mask[..., : tokens.shape[1]].masked_fill_((tokens >= stretch.start)[:, None, None], float("-inf"))
        # Without documents, one shape has one mask.
        elif pattern.positions is not None or mask.shape[-2:] != (len(query), len(key)):
            mask = pattern.bias(query, key, dtype)
        yield queries, _Keys(stretch, tokens), mask


def _heads_first(x: Tensor, positions: slice) -> Tensor:
    """[batch, seq, heads, ...] -> [batch, heads, positions, ...]"""
    return x[:, positions].transpose(1, 2)


def _upcast(x: Tensor) -> Tensor:
    """Cast to at least float32, with contiguous features: the kernel assumes their stride to be 1 unchecked."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if x.stride(-1) == 1 else x.contiguous()
