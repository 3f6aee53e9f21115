"""Products of the backward pass of SwiGLU experts on one GPU that do more than multiply.

As in SonicMoE (Guo et al., 2025): the gradients of the activation and of the routing weights are computed where
the gradient of the hidden features is made, and rows can be gathered while products load them. Experts with the most
rows come first, so that no processor is left with one at the end.

Letters: M rows or the first dim of a gradient, N columns of the output, K what is summed over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moescale.ops.descriptors_triton import allow_descriptors, whole
from moescale.ops.grouped_gemm_triton import (
    GemmTile,
    ends_of,
    load_rows,
    load_weight,
    matrices_of,
    processors,
    product,
    tile_position,
)


def tile_of(x: Tensor, form: str) -> GemmTile:
    """Choose a tile that spills no registers on sm_90. form: HIDDEN or MATRICES"""
    if x.device.type == "cpu":
        return GemmTile(32, 32, 32, 4, 1)
    if x.dtype == torch.float32:
        return GemmTile(64, 64, 32, 8, 2)
    return GemmTile(128, 128, 64, 8, 5) if form == "HIDDEN" else GemmTile(128, 256, 64, 8, 7)


def grad_through_activation(
    grad: Tensor, token: Tensor | None, down: Tensor, act_gate: Tensor, act_up: Tensor, weight: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what follows from the gradient of the hidden features, which itself is never stored.

    grad: [tokens, d_model], of the outputs, whose rows are gathered by token, [assignments]; without it, rows as they
    are. down: [experts, d_model, d_ff]. act_gate, act_up: [assignments, d_ff], the products of gate and up. weight:
    [assignments] float32, the routing's. counts: [experts], rows of each. All dims are multiples of 16 bytes.
    -> the hidden features, weighed, [assignments, d_ff]; the gradients of both products, [2, assignments, d_ff]; those
    of the weights, [assignments] float32
    """
    assignments, d_ff = act_gate.shape
    hidden, grad_acts = torch.empty_like(act_gate), act_gate.new_empty(2, assignments, d_ff)
    tile, experts = tile_of(grad, "HIDDEN"), len(counts)
    parts = torch.zeros(triton.cdiv(d_ff, tile.n), assignments, dtype=torch.float32, device=grad.device)
    if assignments:
        order = counts.argsort(descending=True, stable=True)
        tile_ends = ends_of((counts[order] + tile.m - 1) // tile.m)
        most = (triton.cdiv(assignments, tile.m) + experts) * len(parts)
        allow_descriptors()
        _grad_hidden[(min(processors(grad), most),)](
            whole(grad), token, whole(down), act_gate, act_up, weight, hidden, grad_acts, parts, ends_of(counts),
            tile_ends, order, assignments, experts, d_ff, grad.shape[1], EXPERTS=triton.next_power_of_2(experts),
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=8, UPCAST=grad.device.type == "cpu",
            num_warps=tile.warps, num_stages=tile.stages,
        )
    return hidden, grad_acts, parts.sum(0)


def grad_matrices(
    left: Tensor, right: Tensor, counts: Tensor, *, left_token: Tensor | None = None, right_token: Tensor | None = None
) -> Tensor:
    """Sum the outer products of each expert's rows; the result is zero for an expert without rows.

    left: [n, assignments, d_out], of which each has a result of its own. right: [assignments, d_in]. left_token,
    right_token: [assignments] int64; that side has tokens in place of assignments then, and its rows are gathered.
    -> [n, experts, d_out, d_in]
    """
    left, right = whole(left), whole(right)
    (number, _, d_out), d_in, experts, tile = left.shape, right.shape[1], len(counts), tile_of(right, "MATRICES")
    out = right.new_empty(number, experts, d_out, d_in)
    tiles = triton.cdiv(d_out, tile.m) * triton.cdiv(d_in, tile.n) * experts * number
    allow_descriptors()
    _grad_matrices[(min(processors(right), tiles),)](
        left, right, out, left_token, right_token, ends_of(counts), counts.argsort(descending=True, stable=True),
        left.shape[1], experts, d_out, d_in, NUMBER=number, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=8,
        UPCAST=right.device.type == "cpu", num_warps=tile.warps, num_stages=tile.stages,
    )
    return out


@triton.jit
def _halves(x):
    """Part the columns of a tile in two."""
    m: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    return x.reshape(m, 2, n // 2).permute(0, 2, 1).split()


@triton.jit
def _quarters(x):
    """Part the columns of a tile in four."""
    left, right = _halves(x)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit
def _store_gradients(
    grad, n, start, rows, here, weight, num_rows, N, ActGate, ActUp, Hidden, GradActs, WIDTH: tl.constexpr
):
    """Store a part of the hidden features and of the gradients of both products. -> its sum for the weights' gradient

    grad: of the hidden features before they are weighed. n: its first column. rows: within the expert's tile, from
    row `start` on.
    """
    column = n + tl.arange(0, WIDTH)
    first = start.to(tl.int64) * N
    offset, mask = rows[:, None] * N + column[None, :], here[:, None] & (column < N)[None, :]
    gate = tl.load(ActGate + first + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(ActUp + first + offset, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    hidden = silu * up
    total = tl.sum(grad * hidden, 1)
    tl.store(Hidden + first + offset, (hidden * weight).to(Hidden.dtype.element_ty), mask=mask)
    grad *= weight
    grad_up = GradActs + num_rows.to(tl.int64) * N
    tl.store(grad_up + first + offset, (grad * silu).to(Hidden.dtype.element_ty), mask=mask)
    slope = sigmoid * (1 + gate - silu)  # of silu
    tl.store(GradActs + first + offset, (grad * up * slope).to(Hidden.dtype.element_ty), mask=mask)
    return total


@triton.jit
def _grad_hidden(
    Grad, Token, Down, ActGate, ActUp, Weight, Hidden, GradActs, Parts, RowEnds, TileEnds, Order, num_rows, experts,
    N, K, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, UPCAST: tl.constexpr,
):
    """Compute tiles of a grouped product, and what follows from each."""
    expert_index = tl.arange(0, EXPERTS)
    ends = tl.load(TileEnds + 1 + expert_index, mask=expert_index < experts, other=2147483647)
    tiles_m, tiles_n = tl.load(TileEnds + experts), tl.cdiv(N, BLOCK_N)
    matrices = matrices_of(Down, experts, N, K, True, BLOCK_N, BLOCK_K)
    grad_rows = tl.make_tensor_descriptor(Grad, [num_rows, K], [K, 1], [BLOCK_M, BLOCK_K])
    rows = tl.arange(0, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        # Which rows and columns, and whose.
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP)
        place = tl.sum((ends <= tile_m).to(tl.int32))
        expert = tl.load(Order + place).to(tl.int32)
        start = tl.load(RowEnds + expert) + (tile_m - tl.load(TileEnds + place)) * BLOCK_M
        here = start + rows < tl.load(RowEnds + expert + 1)
        offset_grad = tl.load(Token + start + rows, mask=here, other=0) * K if Token is not None else rows
        # The product with down.
        grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            given = load_rows(Grad, grad_rows, start, offset_grad, here, k, K, Token is not None, UPCAST)
            grad = product(given, load_weight(matrices, expert, tile_n * BLOCK_N, k, True, UPCAST), grad)
        # The activation, of a quarter of the columns at a time: that is how many registers there are.
        weight = tl.load(Weight + start + rows, mask=here, other=0.0)[:, None]
        parts = _quarters(grad)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.static_range(4):
            n = tile_n * BLOCK_N + i * (BLOCK_N // 4)
            total += _store_gradients(parts[i], n, start, rows, here, weight, num_rows, N, ActGate, ActUp, Hidden,
                                      GradActs, BLOCK_N // 4)
        tl.store(Parts + tile_n.to(tl.int64) * num_rows + start + rows, total, mask=here)


@triton.jit
def _load_factor(X, rows, Token, k, end, n, N, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """Load rows from k up to `end`, by their tokens if there are such, else by the descriptor. -> [BLOCK_K, WIDTH]"""
    if Token is None:
        x = rows.load([k, n])
    else:
        row, column = k + tl.arange(0, BLOCK_K), n + tl.arange(0, WIDTH)
        token = tl.load(Token + row, mask=row < end, other=0)
        x = tl.load(X + token[:, None] * N + column[None, :], mask=(row < end)[:, None] & (column < N)[None, :],
                    other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _grad_matrices(
    Left, Right, Out, LeftToken, RightToken, RowEnds, Order, num_rows, experts, M, N, NUMBER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):
    """Compute Out[i, expert] = Left[i]^T Right over the expert's rows, BLOCK_K of them at a time.

    Descriptors end with the expert's rows, so that what is loaded beyond is zero. All i of an expert follow each other.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), experts * NUMBER * tiles_m * tiles_n, tl.num_programs(0)):
        matrix = tile // (tiles_m * tiles_n)
        expert, i = tl.load(Order + matrix // NUMBER).to(tl.int32), matrix % NUMBER
        tile_m, tile_n = tile_position(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
        end = tl.load(RowEnds + expert + 1)
        left = Left + i * num_rows.to(tl.int64) * M
        left_rows = tl.make_tensor_descriptor(left, [tl.maximum(end, 1), M], [M, 1], [BLOCK_K, BLOCK_M])
        right_rows = tl.make_tensor_descriptor(Right, [tl.maximum(end, 1), N], [N, 1], [BLOCK_K, BLOCK_N])
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.load(RowEnds + expert), end, BLOCK_K):
            a = _load_factor(left, left_rows, LeftToken, k, end, tile_m * BLOCK_M, M, BLOCK_K, BLOCK_M, UPCAST)
            b = _load_factor(Right, right_rows, RightToken, k, end, tile_n * BLOCK_N, N, BLOCK_K, BLOCK_N, UPCAST)
            total = product(tl.trans(a), b, total)
        m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        out = Out + (i * experts + expert).to(tl.int64) * M * N + m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(out, total.to(Out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
