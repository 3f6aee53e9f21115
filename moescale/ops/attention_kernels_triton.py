"""FlashAttention-2 as Triton kernels: online softmax, tiles that nobody sees skipped, no atomics.

A query sees a contiguous run of keys, from `first` to `last`, and both only grow from query to query. So the tiles that
a tile of queries meets are contiguous too: some are seen in part, which need a mask, some whole by all queries, then
some in part again. The same holds the other way round, from keys to queries.

Letters: M queries and N keys of a tile, D head_dim. Scores are in base 2: times log2(e), so that exp2 can be used.
Tiles are loaded through descriptors, by TMA where the device has it: zeros beyond a sequence and beyond D.
On a processor (the interpreter) bfloat16 is upcast when loaded, since it has no bfloat16 arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MOST_QUERIES = tl.constexpr(128)  # of a tile; a power of two


@triton.jit
def _rows(X, batch, heads, length, D: tl.constexpr, stride_batch, stride_seq, stride_head, BLOCK: tl.constexpr,
          COLUMNS: tl.constexpr):
    """Describe a tensor [batch, length, heads, D], to be loaded [BLOCK, COLUMNS] of one head at a time."""
    return tl.make_tensor_descriptor(
        X, [batch, heads, length, D], [stride_batch, stride_head, stride_seq, 1], [1, 1, BLOCK, COLUMNS]
    )


@triton.jit
def _load(rows, batch, head, start, column, UPCAST: tl.constexpr):
    """Load one tile, zeros beyond the sequence and beyond D. -> [BLOCK, COLUMNS]"""
    x = rows.load([batch, head, start, column]).reshape(rows.block_shape[2], rows.block_shape[3])
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _store(X, x, start, stride, length, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a tile [BLOCK, BLOCK_D] at positions from `start` on, except what is beyond the sequence or D."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    ptr_x = X + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    tl.store(ptr_x, x.to(X.dtype.element_ty), mask=(start + row < length)[:, None] & (column < D)[None, :])


@triton.jit
def _rounded(seq_q):
    """Round the number of queries up to whole tiles of any size: the length of a head's row in LogSum and Delta."""
    return tl.cdiv(seq_q, MOST_QUERIES) * MOST_QUERIES


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")  # for float32: three passes, as exact as float32 to a few ulp


@triton.jit
def _product_in_parts(a_rows, a_head, a_start, b_rows, b_head, b_start, batch, D: tl.constexpr, UPCAST: tl.constexpr):
    """Multiply rows of a with rows of b, some features at a time: whole rows would fill the registers.

    -> [rows of a, rows of b]
    """
    rows_a: tl.constexpr = a_rows.block_shape[2]
    rows_b: tl.constexpr = b_rows.block_shape[2]
    product = tl.zeros((rows_a, rows_b), tl.float32)
    for column in range(0, D, a_rows.block_shape[3]):
        a = _load(a_rows, batch, a_head, a_start, column, UPCAST)
        b = _load(b_rows, batch, b_head, b_start, column, UPCAST)
        product += _product(a, tl.trans(b))
    return product


@triton.jit
def _seen_by(position, First, Last, seq_k, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
             DOCUMENTS: tl.constexpr):
    """Find the first and the last key that a query at this position sees."""
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
    """Find the first and the last position whose query sees the key at this one."""
    first, last = position * 0, position * 0 + seq_k - 1
    if DOCUMENTS:
        inside = tl.minimum(position, seq_k - 1)  # what is beyond is seen by none, or not stored
        first, last = tl.load(First + inside), tl.load(Last + inside)
    if CAUSAL:
        first = position
    if WINDOW:
        last = tl.minimum(last, position + window - 1)
    return first, last


@triton.jit
def _scores(product, query, key, first, last, slope, scale, MASK: tl.constexpr, ALIBI: tl.constexpr):
    """Turn products into scores in base 2, -inf where nothing is seen.

    product: [A, B]. query, key: positions, [A, 1] or [1, B]. first, last: bounds of the keys that each query sees, or
    of the queries that see each key. In the gradient of keys, A are the keys. -> [A, B]
    """
    s = product * (scale * LOG2_E)
    if ALIBI:
        s -= slope * tl.abs(query - key).to(tl.float32)
    if MASK:
        s = tl.where((first <= key) & (key <= last), s, float("-inf"))
    return s


@triton.jit
def _span(PART: tl.constexpr, begin, whole, ragged, end, BLOCK: tl.constexpr):
    """Find where the tiles of one part begin and end.

    PART: 0 = the first tiles, seen in part; 1 = those seen whole; 2 = the last ones, in part again.
    begin, end: bounds of what is seen by some. whole, ragged: bounds of what is seen by all.
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
def attend(
    Q, K, V, Out, LogSum, First, Last, Slopes, q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head,
    g_batch, g_seq, g_head, seq_q, seq_k, window, scale, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr, ALIBI: tl.constexpr, SLICE: tl.constexpr, UPCAST: tl.constexpr,
):
    """Compute the output of one tile of queries, and their scores' log-sum-exp in base 2."""
    # Which tile this is.
    start, head = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M, tl.program_id(1)  # the longest ones first
    heads, batches, batch = tl.num_programs(1), tl.num_programs(2), tl.program_id(2)
    kv_heads, kv_head = heads // GROUP, head // GROUP
    if DOCUMENTS:
        First += batch.to(tl.int64) * seq_k
        Last += batch.to(tl.int64) * seq_k
    shift = seq_k - seq_q
    row = start + tl.arange(0, BLOCK_M)
    offset_row = (batch.to(tl.int64) * heads + head) * _rounded(seq_q) + row
    # Which keys each query sees, which some query of the tile sees, and which all of them see.
    position = tl.minimum(row, seq_q - 1) + shift
    first, last = _seen_by(position, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    begin, ragged = _seen_by(start + shift, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    whole, end = _seen_by(tl.minimum(start + BLOCK_M, seq_q) - 1 + shift, First, Last, seq_k, window, CAUSAL, WINDOW,
                          DOCUMENTS)
    slope = tl.load(Slopes + head) * LOG2_E if ALIBI else 0.0
    q_rows = _rows(Q, batches, heads, seq_q, D, q_batch, q_seq, q_head, BLOCK_M, SLICE)
    k_rows = _rows(K, batches, kv_heads, seq_k, D, k_batch, k_seq, k_head, BLOCK_N, SLICE)
    v_rows = _rows(V, batches, kv_heads, seq_k, D, v_batch, v_seq, v_head, BLOCK_N, BLOCK_D)
    if SLICE == BLOCK_D:
        q = _load(q_rows, batch, head, start, 0, UPCAST)
    # The online softmax over tiles of keys, masked only where a tile is seen in part.
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)  # not -inf, whose difference to itself is no number
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(3):
        if part > 0 or WINDOW or DOCUMENTS:
            left, right = _span(part, begin, whole, ragged + 1, end + 1, BLOCK_N)
            for at in range(left, right, BLOCK_N):
                if SLICE == BLOCK_D:
                    product = _product(q, tl.trans(_load(k_rows, batch, kv_head, at, 0, UPCAST)))
                else:
                    product = _product_in_parts(q_rows, head, start, k_rows, kv_head, at, batch, D, UPCAST)
                key = at + tl.arange(0, BLOCK_N)
                s = _scores(product, position[:, None], key[None, :], first[:, None], last[:, None], slope,
                            scale, part != 1, ALIBI)
                # What was added up under the old maximum shrinks to the new one.
                higher = tl.maximum(top, tl.max(s, 1))
                p = tl.exp2(s - higher[:, None])
                shrink = tl.exp2(top - higher)
                v = _load(v_rows, batch, kv_head, at, 0, UPCAST)
                out = out * shrink[:, None] + _product(p.to(v.dtype), v)
                total = total * shrink + tl.sum(p, 1)
                top = higher
    Out += (batch.to(tl.int64) * seq_q * heads + head) * D
    _store(Out, out / total[:, None], start, heads * D, seq_q, BLOCK_M, D, BLOCK_D)
    tl.store(LogSum + offset_row, tl.where(row < seq_q, top + tl.log2(total), 0.0))


@triton.jit
def grad_queries(
    Q, K, V, Grad, Out, LogSum, Delta, GradQ, First, Last, Slopes, q_batch, q_seq, q_head, k_batch, k_seq, k_head,
    v_batch, v_seq, v_head, g_batch, g_seq, g_head, seq_q, seq_k, window, scale, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr, ALIBI: tl.constexpr, SLICE: tl.constexpr, UPCAST: tl.constexpr,
):
    """Compute the gradient of one tile of queries, and their deltas: each output times its gradient, summed."""
    # Which tile this is.
    start, head = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M, tl.program_id(1)  # the longest ones first
    heads, batches, batch = tl.num_programs(1), tl.num_programs(2), tl.program_id(2)
    kv_heads, kv_head = heads // GROUP, head // GROUP
    if DOCUMENTS:
        First += batch.to(tl.int64) * seq_k
        Last += batch.to(tl.int64) * seq_k
    shift = seq_k - seq_q
    row = start + tl.arange(0, BLOCK_M)
    offset_row = (batch.to(tl.int64) * heads + head) * _rounded(seq_q) + row
    # Which keys each query sees, which some query of the tile sees, and which all of them see.
    position = tl.minimum(row, seq_q - 1) + shift
    first, last = _seen_by(position, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    begin, ragged = _seen_by(start + shift, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    whole, end = _seen_by(tl.minimum(start + BLOCK_M, seq_q) - 1 + shift, First, Last, seq_k, window, CAUSAL, WINDOW,
                          DOCUMENTS)
    slope = tl.load(Slopes + head) * LOG2_E if ALIBI else 0.0
    q_rows = _rows(Q, batches, heads, seq_q, D, q_batch, q_seq, q_head, BLOCK_M, SLICE)
    k_rows = _rows(K, batches, kv_heads, seq_k, D, k_batch, k_seq, k_head, BLOCK_N, BLOCK_D)
    k_parts = _rows(K, batches, kv_heads, seq_k, D, k_batch, k_seq, k_head, BLOCK_N, SLICE)
    v_parts = _rows(V, batches, kv_heads, seq_k, D, v_batch, v_seq, v_head, BLOCK_N, SLICE)
    g_rows = _rows(Grad, batches, heads, seq_q, D, g_batch, g_seq, g_head, BLOCK_M, BLOCK_D)
    g_parts = _rows(Grad, batches, heads, seq_q, D, g_batch, g_seq, g_head, BLOCK_M, SLICE)
    stride_batch = tl.cast(seq_q, tl.int64) * heads * D
    out_rows = _rows(Out, batches, heads, seq_q, D, stride_batch, heads * D, D, BLOCK_M, BLOCK_D)
    if SLICE == BLOCK_D:
        q = _load(q_rows, batch, head, start, 0, UPCAST)
    grad, out = _load(g_rows, batch, head, start, 0, UPCAST), _load(out_rows, batch, head, start, 0, UPCAST)
    # The deltas, which the gradient of keys needs as well.
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(Delta + offset_row, delta)
    log_sum = tl.load(LogSum + offset_row)
    # The gradient through the softmax, p (grad_p - delta), tile of keys by tile of keys.
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in tl.static_range(3):
        if part > 0 or WINDOW or DOCUMENTS:
            left, right = _span(part, begin, whole, ragged + 1, end + 1, BLOCK_N)
            for at in range(left, right, BLOCK_N):
                k = _load(k_rows, batch, kv_head, at, 0, UPCAST)
                if SLICE == BLOCK_D:
                    product = _product(q, tl.trans(k))
                    grad_p = _product(grad, tl.trans(_load(v_parts, batch, kv_head, at, 0, UPCAST)))
                else:
                    product = _product_in_parts(q_rows, head, start, k_parts, kv_head, at, batch, D, UPCAST)
                    grad_p = _product_in_parts(g_parts, head, start, v_parts, kv_head, at, batch, D, UPCAST)
                key = at + tl.arange(0, BLOCK_N)
                s = _scores(product, position[:, None], key[None, :], first[:, None], last[:, None], slope,
                            scale, part != 1, ALIBI)
                grad_s = tl.exp2(s - log_sum[:, None]) * (grad_p - delta[:, None])
                grad_q += _product(grad_s.to(k.dtype), k)
    GradQ += (batch.to(tl.int64) * seq_q * heads + head) * D
    _store(GradQ, grad_q * scale, start, heads * D, seq_q, BLOCK_M, D, BLOCK_D)


@triton.jit
def grad_keys(
    Q, K, V, Grad, LogSum, Delta, GradK, GradV, First, Last, Slopes, q_batch, q_seq, q_head, k_batch, k_seq, k_head,
    v_batch, v_seq, v_head, g_batch, g_seq, g_head, seq_q, seq_k, window, scale, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr, ALIBI: tl.constexpr, SLICE: tl.constexpr, UPCAST: tl.constexpr,
):
    """Compute the gradients of one tile of keys and values, from all query heads of their group, one after another."""
    # Which tile this is.
    start, kv_head = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    kv_heads, batches, batch = tl.num_programs(1), tl.num_programs(2), tl.program_id(2)
    heads = kv_heads * GROUP
    if DOCUMENTS:
        First += batch.to(tl.int64) * seq_k
        Last += batch.to(tl.int64) * seq_k
    shift = seq_k - seq_q
    # Which queries see each key, and the tiles of queries that see any.
    key = start + tl.arange(0, BLOCK_N)
    first, last = _seeing(key, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    begin, _ = _seeing(start, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    _, end = _seeing(tl.minimum(start + BLOCK_N, seq_k) - 1, First, Last, seq_k, window, CAUSAL, WINDOW, DOCUMENTS)
    begin = tl.maximum(begin - shift, 0) // BLOCK_M * BLOCK_M  # queries from here on, not positions
    count = tl.cdiv(tl.maximum(end + 1 - shift - begin, 0), BLOCK_M)
    q_rows = _rows(Q, batches, heads, seq_q, D, q_batch, q_seq, q_head, BLOCK_M, BLOCK_D)
    q_parts = _rows(Q, batches, heads, seq_q, D, q_batch, q_seq, q_head, BLOCK_M, SLICE)
    g_rows = _rows(Grad, batches, heads, seq_q, D, g_batch, g_seq, g_head, BLOCK_M, BLOCK_D)
    g_parts = _rows(Grad, batches, heads, seq_q, D, g_batch, g_seq, g_head, BLOCK_M, SLICE)
    k_parts = _rows(K, batches, kv_heads, seq_k, D, k_batch, k_seq, k_head, BLOCK_N, SLICE)
    v_parts = _rows(V, batches, kv_heads, seq_k, D, v_batch, v_seq, v_head, BLOCK_N, SLICE)
    if SLICE == BLOCK_D:
        k, v = _load(k_parts, batch, kv_head, start, 0, UPCAST), _load(v_parts, batch, kv_head, start, 0, UPCAST)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # All tiles are masked: a loop without a mask between two with one would spill registers; so would one in another.
    for index in range(GROUP * count):
        head, at = kv_head * GROUP + index // count, begin + index % count * BLOCK_M
        row = at + tl.arange(0, BLOCK_M)
        offset_row = (batch.to(tl.int64) * heads + head) * _rounded(seq_q) + row
        slope = tl.load(Slopes + head) * LOG2_E if ALIBI else 0.0
        q = _load(q_rows, batch, head, at, 0, UPCAST)
        if SLICE == BLOCK_D:
            product = _product(k, tl.trans(q))
        else:
            product = _product_in_parts(k_parts, kv_head, start, q_parts, head, at, batch, D, UPCAST)
        position = row + shift
        s = _scores(product, key[:, None], position[None, :], first[:, None], last[:, None], slope, scale, True,
                    ALIBI)  # [N, M]
        # The gradient of values needs the probabilities, that of keys the one through the softmax.
        p = tl.exp2(s - tl.load(LogSum + offset_row)[None, :])
        grad = _load(g_rows, batch, head, at, 0, UPCAST)
        grad_v += _product(p.to(grad.dtype), grad)
        if SLICE == BLOCK_D:
            grad_p = _product(v, tl.trans(grad))
        else:
            grad_p = _product_in_parts(v_parts, kv_head, start, g_parts, head, at, batch, D, UPCAST)
        grad_s = p * (grad_p - tl.load(Delta + offset_row)[None, :])
        grad_k += _product(grad_s.to(q.dtype), q)
    offset_head = (batch.to(tl.int64) * seq_k * kv_heads + kv_head) * D
    _store(GradK + offset_head, grad_k * scale, start, kv_heads * D, seq_k, BLOCK_N, D, BLOCK_D)
    _store(GradV + offset_head, grad_v, start, kv_heads * D, seq_k, BLOCK_N, D, BLOCK_D)
