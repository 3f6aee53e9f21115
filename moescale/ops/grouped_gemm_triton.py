"""Grouped GEMM as Triton kernels: rows sorted by expert, groups of any size, a fixed order of sums.

The kernel runs one program per processor of the device, and each takes tile after tile. Tiles of a few row tiles and
all columns follow each other, so that weights and rows stay in the L2 cache. The device itself counts where tiles lie:
the host never waits for the sizes of groups. Tiles are loaded through descriptors, by TMA where the device has it;
gathered rows are loaded through pointers.

Letters: M rows, N columns of the output, K what is summed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moescale.ops.descriptors_triton import allow_descriptors, is_whole, padded, unpadded, whole
from moescale.ops.device import is_hopper, shared_bytes


@dataclass(frozen=True)
class GemmTile:
    """The size of one tile of the output (m by n), the step k of its sum, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    flat: bool = False  # the next tile's loads begin before this one is stored, which takes 32 KB more


def tile_of(x: Tensor, form: str) -> GemmTile:
    """Choose a tile that spills no registers on sm_90. form: as in `_multiply`, or OUTER"""
    if x.device.type == "cpu":
        return GemmTile(32, 32, 32, 4, 1)
    if x.dtype == torch.float32:
        return GemmTile(64, 64, 32, 4, 2) if form == "ONE" else GemmTile(64, 32, 32, 4, 2)
    if form == "SWIGLU":
        return GemmTile(128, 128, 64, 8, 3)
    if form == "OUTER":
        return GemmTile(128, 256, 32, 8, 5)
    if form == "ONE" and shared_bytes(x) >= 225 * 1024:
        return GemmTile(128, 256, 64, 8, 4, flat=True)
    return GemmTile(128, 256, 64, 8, 3)


def grouped_gemm(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiply as `ops.grouped_gemm.grouped_gemm` does; bfloat16, float16 or float32. -> [assignments, d_out]"""
    return unpadded(_GroupedGemm.apply(padded(rows), padded(weight, 2), tokens_per_expert), weight.shape[1])


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
    rows: Tensor, weight: Tensor, tokens_per_expert: Tensor, *, scale: Tensor | None = None,
    second: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Multiply each expert's rows by its matrix, whose dims may lie in memory in either order.

    rows: [assignments, d_in]. weight: [experts, d_out, d_in]. scale: [assignments] float32, a factor per output row.
    second: rows and a weight whose product is added. d_in and d_out must be multiples of 16 bytes, here and below.
    -> [assignments, d_out]
    """
    out = rows.new_empty(len(rows), weight.shape[1])
    rows2, weight2 = second or (rows, weight)
    _launch(rows, rows2, weight, weight2, (out, out, out), tokens_per_expert, None, scale, "SUM" if second else "ONE")
    return out


def multiply_swiglu(
    x: Tensor, gate: Tensor, up: Tensor, tokens_per_expert: Tensor, token: Tensor
) -> tuple[Tensor, ...]:
    """Compute the hidden features of SwiGLU experts, gathering each expert's rows while they are loaded.

    x: [tokens, d_model]. gate, up: [experts, d_ff, d_model]. token: [assignments] int64, the token of each row.
    -> silu(rows gate) * (rows up), and the two products, [assignments, d_ff] each
    """
    outs = tuple(x.new_empty(len(token), gate.shape[1]) for _ in range(3))  # separate: two are kept, one is not
    _launch(x, x, gate, up, outs, tokens_per_expert, token, None, "SWIGLU")
    return outs


def grad_weight(grad: Tensor, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Sum the outer products of each expert's rows; the result is zero for an expert without rows.

    grad: [assignments, d_out]. rows: [assignments, d_in]. -> [experts, d_out, d_in]
    """
    ends, grad, rows = ends_of(tokens_per_expert), whole(grad), whole(rows)
    if len(rows) and rows.dtype == torch.bfloat16 and is_hopper(rows):
        return F.grouped_mm(grad.mT, rows, offs=ends[1:])  # a twentieth faster; wrong on a Blackwell, for idle experts
    experts, d_out, d_in, tile = len(tokens_per_expert), grad.shape[1], rows.shape[1], tile_of(rows, "OUTER")
    out = rows.new_empty(experts, d_out, d_in)
    tiles = triton.cdiv(d_out, tile.m) * triton.cdiv(d_in, tile.n) * experts
    allow_descriptors()
    _outer[(min(processors(rows), tiles),)](
        grad, rows, out, ends, experts, d_out, d_in, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=8,
        UPCAST=rows.device.type == "cpu", num_warps=tile.warps, num_stages=tile.stages,
    )
    return out


def _launch(
    rows: Tensor, rows2: Tensor, weight: Tensor, weight2: Tensor, outs: tuple[Tensor, ...],
    tokens_per_expert: Tensor, token: Tensor | None, scale: Tensor | None, form: str,
) -> None:
    """Run `_multiply` over all tiles. outs: one buffer, or the three of SWIGLU. form: as in `_multiply`"""
    if outs[0].numel() == 0:
        return
    rows, rows2 = whole(rows), whole(rows2)
    across = not is_whole(weight) and is_whole(weight.mT) and is_whole(weight2.mT)  # rows of a matrix lie along N
    if not across:
        weight, weight2 = whole(weight), whole(weight2)
    tile, (experts, d_out, d_in) = tile_of(rows, form), weight.shape
    tile_ends = ends_of((tokens_per_expert + tile.m - 1) // tile.m)
    most = (triton.cdiv(len(outs[0]), tile.m) + experts) * triton.cdiv(d_out, tile.n)
    allow_descriptors()
    _multiply[(min(processors(rows), most),)](
        rows, rows2, weight, weight2, *outs, ends_of(tokens_per_expert), tile_ends, token, scale, len(rows), experts,
        d_out, d_in, EXPERTS=triton.next_power_of_2(experts), FORM=form, GATHER=token is not None,
        SCALE=scale is not None, ACROSS=across, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=8,
        FLAT=tile.flat, UPCAST=rows.device.type == "cpu", num_warps=tile.warps, num_stages=tile.stages,
    )


def ends_of(counts: Tensor) -> Tensor:
    """Count where each group ends, after a leading zero. -> [groups + 1] int32; more rows would not fit into memory"""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def processors(x: Tensor) -> int:
    """Count the device's multiprocessors."""
    if x.device.type == "cuda":
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 4  # several, so that each has several tiles


@triton.jit
def product(a, b, total):
    return tl.dot(a, b, total, input_precision="tf32x3")  # for float32: three passes, nearly as exact as float32


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Find the row and column of a tile: tiles of GROUP row tiles follow each other, column by column."""
    first_m = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    return first_m + tile % (GROUP * tiles_n) % height, tile % (GROUP * tiles_n) // height


@triton.jit
def matrices_of(W, experts, N, K, ACROSS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Describe the experts' matrices. ACROSS: rows lie along N instead of K."""
    stride_expert = tl.cast(N, tl.int64) * K
    if ACROSS:
        return tl.make_tensor_descriptor(W, [experts, K, N], [stride_expert, N, 1], [1, BLOCK_K, BLOCK_N])
    else:
        return tl.make_tensor_descriptor(W, [experts, N, K], [stride_expert, K, 1], [1, BLOCK_N, BLOCK_K])


@triton.jit
def load_weight(matrices, expert, n, k, ACROSS: tl.constexpr, UPCAST: tl.constexpr):
    """Load a tile of one expert's matrix. -> [BLOCK_K, BLOCK_N], zeros beyond K and N"""
    if ACROSS:
        w = matrices.load([expert, k, n]).reshape(matrices.block_shape[1], matrices.block_shape[2])
    else:
        w = tl.trans(matrices.load([expert, n, k]).reshape(matrices.block_shape[1], matrices.block_shape[2]))
    return w.to(tl.float32) if UPCAST else w


@triton.jit
def load_rows(X, rows, start, offset_x, here, k, K, GATHER: tl.constexpr, UPCAST: tl.constexpr):
    """Load rows from column k on. -> [BLOCK_M, BLOCK_K]; beyond the group, rows that the caller does not store"""
    if GATHER:
        column = k + tl.arange(0, rows.block_shape[1])
        x = tl.load(X + offset_x[:, None] + column[None, :], mask=here[:, None] & (column < K)[None, :], other=0.0)
    else:
        x = rows.load([start, k])
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _multiply(
    X, X2, W, W2, Out, Out1, Out2, RowEnds, TileEnds, Token, Scale, num_rows, experts, N, K, EXPERTS: tl.constexpr,
    FORM: tl.constexpr, GATHER: tl.constexpr, SCALE: tl.constexpr, ACROSS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr, UPCAST: tl.constexpr,
):
    """Compute tiles of a grouped product.

    FORM: ONE = x w; SUM = x w + x2 w2; SWIGLU = silu(x w) * (x w2), with x w in Out1 and x w2 in Out2.
    """
    expert_index = tl.arange(0, EXPERTS)
    ends = tl.load(TileEnds + 1 + expert_index, mask=expert_index < experts, other=2147483647)
    tiles_m, tiles_n = tl.load(TileEnds + experts), tl.cdiv(N, BLOCK_N)
    rows = tl.make_tensor_descriptor(X, [num_rows, K], [K, 1], [BLOCK_M, BLOCK_K])
    rows2 = tl.make_tensor_descriptor(X2, [num_rows, K], [K, 1], [BLOCK_M, BLOCK_K])
    matrices = matrices_of(W, experts, N, K, ACROSS, BLOCK_N, BLOCK_K)
    matrices2 = matrices_of(W2, experts, N, K, ACROSS, BLOCK_N, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLAT):
        # Which rows and columns, and whose: the expert is the number of those whose tiles end before this one.
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, GROUP)
        expert = tl.sum((ends <= tile_m).to(tl.int32))
        start = tl.load(RowEnds + expert) + (tile_m - tl.load(TileEnds + expert)) * BLOCK_M
        row = start + tl.arange(0, BLOCK_M)
        here = row < tl.load(RowEnds + expert + 1)
        offset_x = tl.load(Token + row, mask=here, other=0) * K if GATHER else row
        # The products: one of x w, two of x w2 in SWIGLU, both in one in SUM.
        one = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        two = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = load_rows(X, rows, start, offset_x, here, k, K, GATHER, UPCAST)
            one = product(x, load_weight(matrices, expert, tile_n * BLOCK_N, k, ACROSS, UPCAST), one)
            if FORM == "SWIGLU":
                two = product(x, load_weight(matrices2, expert, tile_n * BLOCK_N, k, ACROSS, UPCAST), two)
        if FORM == "SUM":
            for k in range(0, K, BLOCK_K):
                x = load_rows(X2, rows2, start, offset_x, here, k, K, GATHER, UPCAST)
                one = product(x, load_weight(matrices2, expert, tile_n * BLOCK_N, k, ACROSS, UPCAST), one)
        # Activate, scale and store.
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        offset_tile = start.to(tl.int64) * N  # separate from the offsets within a tile, or both take registers
        offset = tl.arange(0, BLOCK_M)[:, None] * N + n[None, :]
        mask = here[:, None] & (n < N)[None, :]
        if FORM == "SWIGLU":
            gate, up = one.to(Out.dtype.element_ty), two.to(Out.dtype.element_ty)  # as kept, which backward begins with
            tl.store(Out1 + offset_tile + offset, gate, mask=mask)
            tl.store(Out2 + offset_tile + offset, up, mask=mask)
            one = gate.to(tl.float32) * tl.sigmoid(gate.to(tl.float32)) * up.to(tl.float32)
        if SCALE:
            one *= tl.load(Scale + row, mask=here, other=0.0)[:, None]
        tl.store(Out + offset_tile + offset, one.to(Out.dtype.element_ty), mask=mask)


@triton.jit
def _outer(
    Grad, X, Out, RowEnds, experts, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, UPCAST: tl.constexpr,
):
    """Compute Out[expert] = Grad^T X over the expert's rows, BLOCK_K of them at a time.

    Descriptors end with the expert's rows, so that what is loaded beyond is zero.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), experts * tiles_m * tiles_n, tl.num_programs(0)):
        expert = tile // (tiles_m * tiles_n)
        tile_m, tile_n = tile_position(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
        end = tl.load(RowEnds + expert + 1)
        grad_rows = tl.make_tensor_descriptor(Grad, [tl.maximum(end, 1), M], [M, 1], [BLOCK_K, BLOCK_M])
        x_rows = tl.make_tensor_descriptor(X, [tl.maximum(end, 1), N], [N, 1], [BLOCK_K, BLOCK_N])
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(tl.load(RowEnds + expert), end, BLOCK_K):
            grad, x = grad_rows.load([start, tile_m * BLOCK_M]), x_rows.load([start, tile_n * BLOCK_N])
            if UPCAST:
                grad, x = grad.to(tl.float32), x.to(tl.float32)
            total = product(tl.trans(grad), x, total)
        m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ptr_out = Out + expert.to(tl.int64) * M * N + m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(ptr_out, total.to(Out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
