"""Grouped GEMM as Triton kernels: rows sorted by expert, groups of any size, a fixed order of sums.

As many programs run as the device has processors, and each takes tile after tile; tiles of a few groups of rows and all
columns follow each other, so that weights and rows stay in the L2 cache. Where tiles lie is counted on the device: the
host never waits for the sizes of groups. Weights are loaded through descriptors, by TMA where the device has it; rows,
which are gathered or begin anywhere, through pointers.

Letters: M rows, N columns of the output, K what is summed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    m: int
    n: int
    k: int
    warps: int
    stages: int


def tile_of(x: Tensor, form: str) -> Tile:
    """-> a tile that does not spill registers on sm_90. form: as in `_multiply`, or OUTER"""
    if x.device.type == "cpu":
        return Tile(32, 32, 32, 4, 1)
    if x.dtype == torch.float32:
        return Tile(64, 64, 32, 4, 2) if form == "ONE" else Tile(64, 32, 32, 4, 2)
    if form == "SWIGLU":
        return Tile(128, 64, 64, 8, 4)
    if form == "OUTER":  # rows are found through another load, which takes every second stage
        return Tile(128, 128, 64, 8, 5)
    return Tile(128, 256, 64, 8, 3) if form == "ONE" else Tile(128, 128, 32, 8, 4)


def grouped_gemm(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """As `ops.grouped_gemm.grouped_gemm`; bfloat16, float16 or float32. -> [assignments, d_out]"""
    return _GroupedGemm.apply(rows, weight, tokens_per_expert)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, tokens_per_expert)
        return multiply(rows, weight, tokens_per_expert)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, tokens_per_expert = ctx.saved_tensors
        return multiply(grad, weight.mT, tokens_per_expert), grad_weight(grad, rows, tokens_per_expert), None


def multiply(
    rows: Tensor, weight: Tensor, tokens_per_expert: Tensor, *, token: Tensor | None = None,
    scale: Tensor | None = None, second: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Multiply each expert's rows with its matrix, whatever the order of its dims in memory.

    rows: [assignments, d_in], or [tokens, d_in] of which `token` [assignments] int64 says the one of each row.
    weight: [experts, d_out, d_in]. scale: [assignments] float32, of the result's rows. second: rows and a weight, whose
    product is added. -> [assignments, d_out]
    """
    out = rows.new_empty(len(rows) if token is None else len(token), weight.shape[1])
    rows2, weight2 = second or (rows, weight)
    _launch(rows, rows2, weight, weight2, (out, out, out), tokens_per_expert, token, scale,
            "SUM" if second else "ONE")
    return out


def multiply_swiglu(
    rows: Tensor, gate: Tensor, up: Tensor, tokens_per_expert: Tensor, token: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> silu(rows gate) * (rows up), and the two products, [assignments, d_ff] each; all as in `multiply`"""
    shape = len(rows) if token is None else len(token), gate.shape[1]
    outs = rows.new_empty(shape), rows.new_empty(shape), rows.new_empty(shape)
    _launch(rows, rows, gate, up, outs, tokens_per_expert, token, None, "SWIGLU")
    return outs


def grad_weight(grad: Tensor, rows: Tensor, tokens_per_expert: Tensor, *, token: Tensor | None = None,
                grad_token: Tensor | None = None) -> Tensor:
    """Add up the outer products of each expert's rows; zeros without a row.

    grad: [assignments, d_out], or [tokens, d_out] of which grad_token says the one of each row; rows, token: so too.
    -> [experts, d_out, d_in]
    """
    grad, rows = grad.contiguous(), rows.contiguous()
    experts, d_out, d_in, tile = len(tokens_per_expert), grad.shape[1], rows.shape[1], tile_of(rows, "OUTER")
    out = rows.new_empty(experts, d_out, d_in)
    tiles = triton.cdiv(d_out, tile.m) * triton.cdiv(d_in, tile.n) * experts
    _outer[(min(_processors(rows), tiles),)](
        grad, rows, out, _ends(tokens_per_expert), grad_token, token, experts, d_out, d_in,
        GATHER_GRAD=grad_token is not None, GATHER=token is not None, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        WIDEN=rows.device.type == "cpu", num_warps=tile.warps, num_stages=tile.stages,
    )
    return out


def _launch(
    rows: Tensor, rows2: Tensor, weight: Tensor, weight2: Tensor, outs: tuple[Tensor, Tensor, Tensor],
    tokens_per_expert: Tensor, token: Tensor | None, scale: Tensor | None, form: str,
) -> None:
    if outs[0].numel() == 0:
        return
    rows, rows2 = rows.contiguous(), rows2.contiguous()
    if weight2.stride() != weight.stride():
        weight, weight2 = weight.contiguous(), weight2.contiguous()
    tile, (experts, d_out, d_in) = tile_of(rows, form), weight.shape
    tile_ends = _ends((tokens_per_expert + tile.m - 1) // tile.m)
    most = (triton.cdiv(len(outs[0]), tile.m) + experts) * triton.cdiv(d_out, tile.n)
    triton.set_allocator(_room_for_descriptors)  # of this thread, and backward has another
    _multiply[(min(_processors(rows), most),)](
        rows, rows2, weight, weight2, *outs, _ends(tokens_per_expert), tile_ends, token, scale, *weight.stride(),
        experts, d_out, d_in, EXPERTS=triton.next_power_of_2(experts), FORM=form, GATHER=token is not None,
        SCALE=scale is not None, TMA=_last_dim(weight, weight2), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        GROUP=8, WIDEN=rows.device.type == "cpu", num_warps=tile.warps, num_stages=tile.stages,
    )


def _last_dim(weight: Tensor, weight2: Tensor) -> str:
    """-> K or N, whichever the weights' numbers lie along; "" where 16 does not divide the bytes of their rows"""
    start = weight.data_ptr() | weight2.data_ptr()
    for name, view in (("K", weight), ("N", weight.mT)):
        if view.is_contiguous() and (start | view.shape[-1] * view.element_size()) % 16 == 0:
            return name
    return ""


def _room_for_descriptors(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _ends(counts: Tensor) -> Tensor:
    """-> a zero, then where each group ends, int32: as many rows and more would not fit into memory"""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def _processors(x: Tensor) -> int:
    if x.device.type == "cuda":
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 4  # several, so that each has several tiles


@triton.jit
def _product(a, b, total):
    return tl.dot(a, b, total, input_precision="tf32x3")  # for float32: three passes, nearly as exact as float32


@triton.jit
def _load(at, mask, WIDEN: tl.constexpr):
    x = tl.load(at, mask=mask, other=0.0)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def _load_weight(W, expert, tile_n, start, of_w, w_k, mask, N, K, TMA: tl.constexpr, BLOCK_N: tl.constexpr,
                 WIDEN: tl.constexpr):
    """-> [BLOCK_K, BLOCK_N]. TMA reads the next expert beyond N, where none is stored, or beyond K, where x is zero."""
    if TMA == "K":
        w = tl.trans(W.load([expert * N + tile_n * BLOCK_N, start]))
    elif TMA == "N":
        w = W.load([expert * K + start, tile_n * BLOCK_N])
    else:
        w = tl.load(W + of_w + start * w_k, mask=mask, other=0.0)
    return w.to(tl.float32) if WIDEN else w


@triton.jit
def _multiply(
    X, X2, W, W2, Out, Out1, Out2, RowEnds, TileEnds, Token, Scale, w_expert, w_n, w_k, experts, N, K,
    EXPERTS: tl.constexpr, FORM: tl.constexpr, GATHER: tl.constexpr, SCALE: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
):
    """FORM: ONE = x w; SUM = x w + x2 w2; SWIGLU = silu(x w) * (x w2), x w to Out1 and x w2 to Out2."""
    expert_index = tl.arange(0, EXPERTS)
    ends = tl.load(TileEnds + 1 + expert_index, mask=expert_index < experts, other=2147483647)
    tiles_m, tiles_n = tl.load(TileEnds + experts), tl.cdiv(N, BLOCK_N)
    if TMA == "K":
        W = tl.make_tensor_descriptor(W, [experts * N, K], [K, 1], [BLOCK_N, BLOCK_K])
        W2 = tl.make_tensor_descriptor(W2, [experts * N, K], [K, 1], [BLOCK_N, BLOCK_K])
    if TMA == "N":
        W = tl.make_tensor_descriptor(W, [experts * K, N], [N, 1], [BLOCK_K, BLOCK_N])
        W2 = tl.make_tensor_descriptor(W2, [experts * K, N], [N, 1], [BLOCK_K, BLOCK_N])
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first_m = tile // (GROUP * tiles_n) * GROUP
        height = tl.minimum(tiles_m - first_m, GROUP)
        tile_m, tile_n = first_m + tile % (GROUP * tiles_n) % height, tile % (GROUP * tiles_n) // height
        expert = tl.sum((ends <= tile_m).to(tl.int32))
        row = tl.load(RowEnds + expert) + (tile_m - tl.load(TileEnds + expert)) * BLOCK_M + tl.arange(0, BLOCK_M)
        here = row < tl.load(RowEnds + expert + 1)
        source = tl.load(Token + row, mask=here, other=0) if GATHER else row.to(tl.int64)
        n, k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        of_x = source[:, None] * K + k[None, :]
        of_w = expert.to(tl.int64) * w_expert + n[None, :] * w_n + k[:, None] * w_k
        one = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        two = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            rest = K - start
            mask_x, mask_w = here[:, None] & (k < rest)[None, :], (n < N)[None, :] & (k < rest)[:, None]
            x = _load(X + of_x + start, mask_x, WIDEN)
            w = _load_weight(W, expert, tile_n, start, of_w, w_k, mask_w, N, K, TMA, BLOCK_N, WIDEN)
            one = _product(x, w, one)
            if FORM == "SWIGLU":
                w = _load_weight(W2, expert, tile_n, start, of_w, w_k, mask_w, N, K, TMA, BLOCK_N, WIDEN)
                two = _product(x, w, two)
            if FORM == "SUM":
                x2 = _load(X2 + of_x + start, mask_x, WIDEN)
                w = _load_weight(W2, expert, tile_n, start, of_w, w_k, mask_w, N, K, TMA, BLOCK_N, WIDEN)
                one = _product(x2, w, one)
        of_out = row.to(tl.int64)[:, None] * N + n[None, :]
        mask = here[:, None] & (n < N)[None, :]
        if FORM == "SWIGLU":
            tl.store(Out1 + of_out, one.to(Out.dtype.element_ty), mask=mask)
            tl.store(Out2 + of_out, two.to(Out.dtype.element_ty), mask=mask)
            one = one * tl.sigmoid(one) * two
        if SCALE:
            one *= tl.load(Scale + row, mask=here, other=0.0)[:, None]
        tl.store(Out + of_out, one.to(Out.dtype.element_ty), mask=mask)


@triton.jit
def _outer(
    Grad, X, Out, RowEnds, GradToken, Token, experts, M, N, GATHER_GRAD: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):
    """Out[expert] = Grad^T X over the expert's rows, BLOCK_K of them at a time. Out: [experts, M, N]"""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), experts * tiles_m * tiles_n, tl.num_programs(0)):
        expert = tile // (tiles_m * tiles_n)
        m = tile % (tiles_m * tiles_n) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        end = tl.load(RowEnds + expert + 1)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(tl.load(RowEnds + expert), end, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            here = row < end
            of_grad = tl.load(GradToken + row, mask=here, other=0) if GATHER_GRAD else row.to(tl.int64)
            of_x = tl.load(Token + row, mask=here, other=0) if GATHER else row.to(tl.int64)
            grad = _load(Grad + of_grad[:, None] * M + m[None, :], here[:, None] & (m < M)[None, :], WIDEN)
            x = _load(X + of_x[:, None] * N + n[None, :], here[:, None] & (n < N)[None, :], WIDEN)
            total = _product(tl.trans(grad), x, total)
        at = Out + expert.to(tl.int64) * M * N + m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(at, total.to(Out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
