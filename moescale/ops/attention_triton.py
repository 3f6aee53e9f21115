"""FlashAttention-2 as Triton kernels: online softmax, tiles that nobody sees skipped, no atomics.

A query sees keys side by side, from `first` to `last`, and both only grow from query to query. So the tiles that a tile
of queries has to do with lie side by side too: some that are seen in part, which need a mask, some that all queries see
whole, some in part again. The same holds the other way round, from keys to queries.

Letters: M queries and N keys of a tile, D head_dim. Scores are in base 2: times log2(e), so that exp2 can be used.
On a processor (the interpreter) bfloat16 is widened when loaded, for it has no bfloat16 arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moescale.ops.attention_pattern import Pattern


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one tile; warps, and stages of the pipeline that loads."""

    queries: int
    keys: int
    warps: int
    stages: int


def flash_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Attend exactly, in memory that grows with the sequence and not with its square (FlashAttention-2, alg. 1 and 2).

    q: [batch, seq_q, heads, head_dim]; k, v: [batch, seq_k, kv_heads, head_dim]; head_dim 16 to 256; float32, bfloat16
    or float16, computed in float32. -> like q. Every gradient is added up in a fixed order.
    """
    return _Flash.apply(q, k, v, pattern)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        q, k, v = _rows_whole(q), _rows_whole(k), _rows_whole(v)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        log_sum = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
        bounds = _bounds_of_documents(pattern)
        if q.numel():
            _forward[_grid(q, tiles(q)[0].queries)](
                q, k, v, out, log_sum, *bounds, pattern.slopes, *_numbers(q, k, v, q, pattern),
                **_options(q, k, pattern, tiles(q)[0]),
            )
        ctx.pattern = pattern
        ctx.save_for_backward(q, k, v, out, log_sum, *bounds)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, log_sum, *bounds = ctx.saved_tensors
        grad, pattern = _rows_whole(grad), ctx.pattern
        make = torch.empty if q.numel() else torch.zeros
        of_q, of_k, of_v = (make(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if q.numel():
            delta = torch.empty_like(log_sum)
            numbers = _numbers(q, k, v, grad, pattern)
            _, by_queries, by_keys = tiles(q)
            _grad_queries[_grid(q, by_queries.queries)](
                q, k, v, grad, out, log_sum, delta, of_q, *bounds, pattern.slopes, *numbers,
                **_options(q, k, pattern, by_queries),
            )
            _grad_keys[_grid(k, by_keys.keys)](
                q, k, v, grad, log_sum, delta, of_k, of_v, *bounds, pattern.slopes, *numbers,
                **_options(q, k, pattern, by_keys),
            )
        return of_q, of_k, of_v, None


def tiles(q: Tensor) -> tuple[Tile, Tile, Tile]:
    """-> for the output, the gradient of queries, that of keys and values; none spills registers on sm_90"""
    if q.device.type == "cpu":
        return (Tile(32, 32, 4, 1),) * 3  # small, so that short sequences have many
    if q.dtype == torch.float32:
        if q.shape[3] > 128:
            return (Tile(32, 16, 8, 1),) * 3
        if q.shape[3] > 64:
            return Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)
        return Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1)
    if q.shape[3] > 128:
        return Tile(128, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)
    if q.shape[3] > 64:
        return Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2)
    return Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3)


def _grid(x: Tensor, rows: int) -> tuple[int, int, int]:
    """Tiles of one head run one after another: they share keys in the cache."""
    return triton.cdiv(x.shape[1], rows), x.shape[2], x.shape[0]


def _rows_whole(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bounds_of_documents(pattern: Pattern) -> tuple[Tensor | None, Tensor | None]:
    if pattern.positions is None:
        return None, None
    first, last = pattern.documents()
    return first.int(), last.int()


def _numbers(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, pattern: Pattern) -> list[int | float]:
    """-> what kernels take as numbers: strides of batch, position and head, sizes, window, scale"""
    strides = [stride for x in (q, k, v, grad) for stride in x.stride()[:3]]
    return [*strides, q.shape[1], k.shape[1], pattern.window or 0, pattern.scale]


def _options(q: Tensor, k: Tensor, pattern: Pattern, tile: Tile) -> dict[str, Any]:
    """-> what kernels are compiled for"""
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    return {
        "GROUP": q.shape[2] // k.shape[2], "D": q.shape[3], "BLOCK_D": block_d,
        "SLICE": 64 if q.dtype == torch.float32 and block_d > 128 else block_d,
        "BLOCK_M": tile.queries, "BLOCK_N": tile.keys, "CAUSAL": pattern.causal,
        "WINDOW": pattern.window is not None, "DOCUMENTS": pattern.positions is not None,
        "ALIBI": pattern.slopes is not None, "WIDEN": q.device.type == "cpu",
        "num_warps": tile.warps, "num_stages": tile.stages,
    }


@triton.jit
def _load(X, start, stride, length, CHECK: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
          WIDEN: tl.constexpr):
    """-> rows from `start` on, zeros beyond `length` and beyond D. [BLOCK, BLOCK_D]"""
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = X + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    if CHECK:
        x = tl.load(at, mask=(start + row < length)[:, None] & (column < D)[None, :], other=0.0)
    elif D != BLOCK_D:
        x = tl.load(at, mask=(row >= 0)[:, None] & (column < D)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def _store(X, x, start, stride, length, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = X + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=(start + row < length)[:, None] & (column < D)[None, :])


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")  # for float32: three passes, as exact as float32 to a few ulp


@triton.jit
def _product_in_parts(A, a_start, a_stride, a_length, B, b_start, b_stride, b_length, BLOCK_A: tl.constexpr,
                      BLOCK_B: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, WIDEN: tl.constexpr):
    """-> the products of rows of A with rows of B, loaded SLICE features at a time: whole, they fill the registers"""
    row_a, row_b, column = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_B), tl.arange(0, SLICE)
    A += tl.cast(a_start, tl.int64) * a_stride + row_a[:, None] * a_stride
    B += tl.cast(b_start, tl.int64) * b_stride + row_b[:, None] * b_stride
    product = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for first in range(0, D, SLICE):
        at = first + column[None, :]
        a = tl.load(A + at, mask=(a_start + row_a < a_length)[:, None] & (at < D), other=0.0)
        b = tl.load(B + at, mask=(b_start + row_b < b_length)[:, None] & (at < D), other=0.0)
        product += _product(a.to(tl.float32) if WIDEN else a, tl.trans(b.to(tl.float32) if WIDEN else b))
    return product


@triton.jit
def _seen_by(position, First, Last, seq_k, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
             DOCUMENTS: tl.constexpr):
    """-> the first and the last key that a query at this position sees"""
    first, last = position * 0, position * 0 + seq_k - 1
    if DOCUMENTS:
        first, last = tl.load(First + position), tl.load(Last + position)
    if CAUSAL:
        last = position
    if WINDOW:
        first = tl.maximum(first, position - window + 1)
    return first, last


@triton.jit
def _seeing(position, First, Last, seq_k, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
            DOCUMENTS: tl.constexpr):
    """-> the first and the last position whose query sees the key at this one"""
    first, last = position * 0, position * 0 + seq_k - 1
    if DOCUMENTS:
        first, last = tl.load(First + position), tl.load(Last + position)
    if CAUSAL:
        first = position
    if WINDOW:
        last = tl.minimum(last, position + window - 1)
    return first, last


@triton.jit
def _scores(product, query, key, first, last, slope, scale, MASK: tl.constexpr, ALIBI: tl.constexpr):
    """-> in base 2, -inf where nothing is seen. product: [A, B]; positions and what each sees: [A, 1] or [1, B]

    For the gradient of keys, A are the keys.
    """
    s = product * (scale * 1.4426950408889634)
    if ALIBI:
        s -= slope * tl.abs(query - key).to(tl.float32)
    if MASK:
        s = tl.where((first <= key) & (key <= last), s, float("-inf"))
    return s


@triton.jit
def _span(PART: tl.constexpr, begin, whole, ragged, end, BLOCK: tl.constexpr):
    """-> where tiles of a part begin and end. PART: 0 = the first ones, seen in part; 1 = seen whole; 2 = in part again

    begin, end: of all that is seen by some. whole, ragged: begin and end of what is seen by all.
    """
    begin = begin // BLOCK * BLOCK
    whole = tl.cdiv(whole, BLOCK) * BLOCK
    ragged = tl.maximum(whole, ragged // BLOCK * BLOCK)
    if PART == 0:
        end = tl.minimum(whole, end)
    elif PART == 1:
        begin, end = whole, ragged
    else:
        begin = ragged
    return begin, end


@triton.jit
def _forward(
    Q, K, V, Out, LogSum, First, Last, Slopes, q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head,
    g_batch, g_seq, g_head, seq_q, seq_k, window, scale, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    ALIBI: tl.constexpr, SLICE: tl.constexpr, WIDEN: tl.constexpr,
):
    """The output of one tile of queries, and their scores' log-sum-exp."""
    start, head = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M, tl.program_id(1)  # the longest ones first
    heads, batch = tl.num_programs(1), tl.program_id(2).to(tl.int64)
    Q += batch * q_batch + head.to(tl.int64) * q_head
    K += batch * k_batch + (head // GROUP).to(tl.int64) * k_head
    V += batch * v_batch + (head // GROUP).to(tl.int64) * v_head
    if DOCUMENTS:
        First += batch * seq_k
        Last += batch * seq_k
    shift = seq_k - seq_q
    row = start + tl.arange(0, BLOCK_M)
    position = tl.minimum(row, seq_q - 1) + shift
    first, last = _seen_by(position, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    begin, ragged = _seen_by(start + shift, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    whole, end = _seen_by(tl.minimum(start + BLOCK_M, seq_q) - 1 + shift, First, Last, seq_k, window, CAUSAL, WINDOW,
                          DOCUMENTS)
    slope = tl.load(Slopes + head) * 1.4426950408889634 if ALIBI else 0.0
    if SLICE == BLOCK_D:
        q = _load(Q, start, q_seq, seq_q, True, BLOCK_M, D, BLOCK_D, WIDEN)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)  # not -inf, whose difference to itself is no number
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(3):
        if part > 0 or WINDOW or DOCUMENTS:
            left, right = _span(part, begin, whole, ragged + 1, end + 1, BLOCK_N)
            for at in range(left, right, BLOCK_N):
                if SLICE == BLOCK_D:
                    k = _load(K, at, k_seq, seq_k, part != 1, BLOCK_N, D, BLOCK_D, WIDEN)
                    product = _product(q, tl.trans(k))
                else:
                    product = _product_in_parts(Q, start, q_seq, seq_q, K, at, k_seq, seq_k, BLOCK_M, BLOCK_N, D, SLICE,
                                                WIDEN)
                key = at + tl.arange(0, BLOCK_N)
                s = _scores(product, position[:, None], key[None, :], first[:, None], last[:, None], slope,
                            scale, part != 1, ALIBI)
                higher = tl.maximum(top, tl.max(s, 1))
                p = tl.exp2(s - higher[:, None])
                shrink = tl.exp2(top - higher)
                v = _load(V, at, v_seq, seq_k, part != 1, BLOCK_N, D, BLOCK_D, WIDEN)
                out = out * shrink[:, None] + _product(p.to(v.dtype), v)
                total = total * shrink + tl.sum(p, 1)
                top = higher
    Out += (batch * seq_q * heads + head) * D
    _store(Out, out / total[:, None], start, heads * D, seq_q, BLOCK_M, D, BLOCK_D)
    LogSum += (batch * heads + head) * seq_q
    tl.store(LogSum + row, (top + tl.log2(total)) * 0.6931471805599453, mask=row < seq_q)


@triton.jit
def _grad_queries(
    Q, K, V, Grad, Out, LogSum, Delta, GradQ, First, Last, Slopes, q_batch, q_seq, q_head, k_batch, k_seq, k_head,
    v_batch, v_seq, v_head, g_batch, g_seq, g_head, seq_q, seq_k, window, scale, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr, ALIBI: tl.constexpr, SLICE: tl.constexpr, WIDEN: tl.constexpr,
):
    """The gradient of one tile of queries, and each one's delta: the product of its output and that one's gradient."""
    start, head = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M, tl.program_id(1)
    heads, batch = tl.num_programs(1), tl.program_id(2).to(tl.int64)
    Q += batch * q_batch + head.to(tl.int64) * q_head
    K += batch * k_batch + (head // GROUP).to(tl.int64) * k_head
    V += batch * v_batch + (head // GROUP).to(tl.int64) * v_head
    Grad += batch * g_batch + head.to(tl.int64) * g_head
    if DOCUMENTS:
        First += batch * seq_k
        Last += batch * seq_k
    shift = seq_k - seq_q
    row = start + tl.arange(0, BLOCK_M)
    position = tl.minimum(row, seq_q - 1) + shift
    first, last = _seen_by(position, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    begin, ragged = _seen_by(start + shift, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    whole, end = _seen_by(tl.minimum(start + BLOCK_M, seq_q) - 1 + shift, First, Last, seq_k, window, CAUSAL, WINDOW,
                          DOCUMENTS)
    slope = tl.load(Slopes + head) * 1.4426950408889634 if ALIBI else 0.0
    if SLICE == BLOCK_D:
        q = _load(Q, start, q_seq, seq_q, True, BLOCK_M, D, BLOCK_D, WIDEN)
    grad = _load(Grad, start, g_seq, seq_q, True, BLOCK_M, D, BLOCK_D, WIDEN)
    of_head = (batch * seq_q * heads + head) * D
    out = _load(Out + of_head, start, heads * D, seq_q, True, BLOCK_M, D, BLOCK_D, WIDEN)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    of_row = (batch * heads + head) * seq_q + row
    tl.store(Delta + of_row, delta, mask=row < seq_q)
    log_sum = tl.load(LogSum + of_row, mask=row < seq_q, other=0.0) * 1.4426950408889634
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in tl.static_range(3):
        if part > 0 or WINDOW or DOCUMENTS:
            left, right = _span(part, begin, whole, ragged + 1, end + 1, BLOCK_N)
            for at in range(left, right, BLOCK_N):
                k = _load(K, at, k_seq, seq_k, part != 1, BLOCK_N, D, BLOCK_D, WIDEN)
                if SLICE == BLOCK_D:
                    v = _load(V, at, v_seq, seq_k, part != 1, BLOCK_N, D, BLOCK_D, WIDEN)
                    product, grad_p = _product(q, tl.trans(k)), _product(grad, tl.trans(v))
                else:
                    product = _product_in_parts(Q, start, q_seq, seq_q, K, at, k_seq, seq_k, BLOCK_M, BLOCK_N, D, SLICE,
                                                WIDEN)
                    grad_p = _product_in_parts(Grad, start, g_seq, seq_q, V, at, v_seq, seq_k, BLOCK_M, BLOCK_N, D,
                                               SLICE, WIDEN)
                key = at + tl.arange(0, BLOCK_N)
                s = _scores(product, position[:, None], key[None, :], first[:, None], last[:, None], slope,
                            scale, part != 1, ALIBI)
                grad_s = tl.exp2(s - log_sum[:, None]) * (grad_p - delta[:, None])
                grad_q += _product(grad_s.to(k.dtype), k)
    _store(GradQ + of_head, grad_q * scale, start, heads * D, seq_q, BLOCK_M, D, BLOCK_D)


@triton.jit
def _grad_keys(
    Q, K, V, Grad, LogSum, Delta, GradK, GradV, First, Last, Slopes, q_batch, q_seq, q_head, k_batch, k_seq, k_head,
    v_batch, v_seq, v_head, g_batch, g_seq, g_head, seq_q, seq_k, window, scale, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr, ALIBI: tl.constexpr, SLICE: tl.constexpr, WIDEN: tl.constexpr,
):
    """The gradients of one tile of keys and values, from all query heads of their group, one after another."""
    start, kv_head = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    kv_heads, batch = tl.num_programs(1), tl.program_id(2).to(tl.int64)
    heads = kv_heads * GROUP
    K += batch * k_batch + kv_head.to(tl.int64) * k_head
    V += batch * v_batch + kv_head.to(tl.int64) * v_head
    if DOCUMENTS:
        First += batch * seq_k
        Last += batch * seq_k
    shift = seq_k - seq_q
    key = start + tl.arange(0, BLOCK_N)
    first, last = _seeing(tl.minimum(key, seq_k - 1), First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    begin, _ = _seeing(start, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    _, end = _seeing(tl.minimum(start + BLOCK_N, seq_k) - 1, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    begin = tl.maximum(begin - shift, 0) // BLOCK_M * BLOCK_M  # queries from here on, not positions
    end = tl.maximum(end + 1 - shift, 0)
    if SLICE == BLOCK_D:
        k = _load(K, start, k_seq, seq_k, True, BLOCK_N, D, BLOCK_D, WIDEN)
        v = _load(V, start, v_seq, seq_k, True, BLOCK_N, D, BLOCK_D, WIDEN)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # All tiles are masked: a loop without a mask between two with one would spill registers.
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        OfHeadQ = Q + batch * q_batch + tl.cast(head, tl.int64) * q_head
        OfHeadGrad = Grad + batch * g_batch + tl.cast(head, tl.int64) * g_head
        of_head = (batch * heads + head) * seq_q
        slope = tl.load(Slopes + head) * 1.4426950408889634 if ALIBI else 0.0
        for at in range(begin, end, BLOCK_M):
            q = _load(OfHeadQ, at, q_seq, seq_q, True, BLOCK_M, D, BLOCK_D, WIDEN)
            if SLICE == BLOCK_D:
                product = _product(k, tl.trans(q))
            else:
                product = _product_in_parts(K, start, k_seq, seq_k, OfHeadQ, at, q_seq, seq_q, BLOCK_N, BLOCK_M, D,
                                            SLICE, WIDEN)
            row = at + tl.arange(0, BLOCK_M)
            log_sum = tl.load(LogSum + of_head + row, mask=row < seq_q, other=0.0) * 1.4426950408889634
            position = row + shift
            s = _scores(product, key[:, None], position[None, :], first[:, None], last[:, None], slope,
                        scale, True, ALIBI)  # [N, M]
            p = tl.exp2(s - log_sum[None, :])
            grad = _load(OfHeadGrad, at, g_seq, seq_q, True, BLOCK_M, D, BLOCK_D, WIDEN)
            grad_v += _product(p.to(grad.dtype), grad)
            if SLICE == BLOCK_D:
                grad_p = _product(v, tl.trans(grad))
            else:
                grad_p = _product_in_parts(V, start, v_seq, seq_k, OfHeadGrad, at, g_seq, seq_q, BLOCK_N, BLOCK_M, D,
                                           SLICE, WIDEN)
            delta = tl.load(Delta + of_head + row, mask=row < seq_q, other=0.0)
            grad_s = p * (grad_p - delta[None, :])
            grad_k += _product(grad_s.to(q.dtype), q)
    of_head = (batch * seq_k * kv_heads + kv_head) * D
    _store(GradK + of_head, grad_k * scale, start, kv_heads * D, seq_k, BLOCK_N, D, BLOCK_D)
    _store(GradV + of_head, grad_v, start, kv_heads * D, seq_k, BLOCK_N, D, BLOCK_D)
