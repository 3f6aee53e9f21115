"""Compile every Triton kernel as it ships, for a GPU that need not be there; print registers, spills, shared memory.

    python tools/compile_kernels.py [--capability 90] [--only attention]

The functions of `ops` are called with tensors on the meta device, and each launch is compiled in place of being run.
Ends with an error when a kernel spills registers or takes more shared memory than a block may have.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moescale.moe.routing import Routing
from moescale.ops import device
from moescale.ops.attention_pattern import AttentionPattern, Visibility
from moescale.ops.attention_triton import flash_attention
from moescale.ops.expert_feed_forward_triton import BACKWARDS, fused_experts
from moescale.ops.grouped_gemm_triton import grouped_gemm
from moescale.ops.head_losses_triton import grad_logits, normalise
from moescale.ops.permute_triton import permute, unpermute
from moescale.ops.rms_norm_triton import rms_norm
from moescale.ops.rotary_triton import rotate
from moescale.ops.router_triton import route, rows_by_expert
from moescale.ops.scan_triton import selective_scan

SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of a block, by compute capability
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1", torch.uint8: "*u8",
}


Cases = Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]  # what it is, a function and its arguments


@dataclass(frozen=True)
class Launch:
    """A kernel with the types and sizes of its arguments: what decides how it is compiled."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]  # arguments that 16 divides
    warps: int
    stages: int

    @staticmethod
    def of(kernel: JITFunction, values: tuple[Any, ...], options: dict[str, Any]) -> Launch:
        given = dict(zip(kernel.arg_names, values, strict=False)) | options
        signature, constants, aligned = {}, {}, []
        for index, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[parameter.name] = TYPES[value.dtype]
                aligned.append(index)
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
                aligned += [index] if value % 16 == 0 else []
        return Launch(kernel, signature, constants, tuple(aligned), options["num_warps"], options["num_stages"])

    def compile(self, capability: int) -> tuple[int, int, int]:
        """Compile a kernel. -> registers per thread, spilled bytes per thread, bytes of shared memory per block"""
        source = ASTSource(
            fn=self.kernel, signature=self.signature, constexprs=self.constants,
            attrs={(index,): [["tt.divisibility", 16]] for index in self.aligned},
        )
        options = {"num_warps": self.warps, "num_stages": self.stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            text = subprocess.run([tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True)
        registers, stack = (int(re.findall(rf"{name}:(\d+)", text.stdout)[-1]) for name in ("REG", "STACK"))
        return registers, stack, compiled.metadata.shared


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Note launches in place of making them."""
    launches: list[Launch] = []

    def note(kernel: JITFunction, *values: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch.of(kernel, values, options))

    with mock.patch.object(JITFunction, "run", note):
        yield launches


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def integers(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attention() -> Cases:
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (64, 128, 256):
            for shape, window, documents, alibi in (("causal", None, False, False), ("all", 4096, True, True)):
                q, k = (empty(2, 8192, heads, head_dim, dtype=dtype) for heads in (32, 8))
                positions, slopes = integers(2, 8192) if documents else None, empty(32) if alibi else None
                pattern = AttentionPattern(True, Visibility(window), positions, slopes, head_dim**-0.5)
                yield f"{shape}, head_dim {head_dim}, {name_of(dtype)}", flash_attention, (q, k, k, pattern)


def there_and_back(x: Tensor, weight: Tensor, token: Tensor, row: Tensor) -> Tensor:
    return unpermute(permute(x, token, row), weight, token, row)


def experts() -> Cases:
    sizes = {"Mixtral": (16384, 4096, 14336, 8, 2), "fine-grained": (32768, 2048, 768, 128, 8)}
    for dtype in (torch.bfloat16, torch.float32):
        for size, (tokens, d_model, d_ff, num, top_k) in sizes.items():
            x, weight, row = empty(tokens, d_model, dtype=dtype), empty(tokens * top_k), integers(tokens, top_k)
            gate, up = empty(num, d_ff, d_model, dtype=dtype), empty(num, d_ff, d_model, dtype=dtype)
            down, token, counts = empty(num, d_model, d_ff, dtype=dtype), integers(tokens * top_k), integers(num)
            name = f"{size}, {name_of(dtype)}"
            for backward in BACKWARDS:
                yield f"fused, {backward}, {name}", partial(fused_experts, backward=backward), (
                    x, gate, up, down, Routing(token, weight, counts, row))
            yield name, grouped_gemm, (empty(tokens * top_k, d_model, dtype=dtype), gate, counts)
            yield f"permute, {name}", there_and_back, (x, weight, token, row)


def router(logits: Tensor, valid: Tensor, expert: Tensor, top_k: int) -> Tensor:
    rows_by_expert(expert, logits.shape[-1])
    weight, probs, z, _, _ = route(logits, valid, top_k, True)
    return weight.sum() + probs.sum() + z.sum()


def losses(logits: Tensor, column: Tensor, of_token: Tensor) -> Tensor:
    log_sum, _ = normalise(logits, column, 1.0)
    grad_logits(logits, column, log_sum, of_token, of_token, 1.0, logits)
    return logits


def rows() -> Cases:
    """What works on rows: router, norm, rotary embedding, losses."""
    for num, top_k in ((8, 2), (128, 8), (2048, 2)):
        valid = empty(4, 4096, dtype=torch.bool)
        yield f"router of {num}", router, (empty(4, 4096, num), valid, integers(16384, top_k), top_k)
    for d_model in (512, 4096, 8192):
        yield f"norm of {d_model}", rms_norm, (empty(4096, d_model, dtype=torch.bfloat16), empty(d_model), 1e-5)
    angle = empty(4, 4096, 1, 64, dtype=torch.bfloat16)
    yield "rotary of 16 heads", rotate, (empty(4, 4096, 16, 128, dtype=torch.bfloat16), angle, angle, 1)
    yield "losses of 256000", losses, (empty(1024, 256000, dtype=torch.bfloat16), integers(1024), empty(1024))


def scan() -> Cases:
    for d_state in (16, 64, 128):
        u, delta, a = empty(2, 4096, 2048, dtype=torch.bfloat16), empty(2, 4096, 2048), empty(2048, d_state)
        b = empty(2, 4096, d_state, dtype=torch.bfloat16)
        yield f"d_state {d_state}", selective_scan, (
            u, delta, a, b, b, empty(2048), empty(2, 4096, dtype=torch.bool), empty(2, 2048, d_state))


CASES = {"attention": attention, "experts": experts, "rows": rows, "scan": scan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, choices=SHARED_BYTES)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--case", default="", help="those whose description holds this")
    arguments = parser.parse_args()
    device.SHARED_BYTES = SHARED_BYTES[arguments.capability]
    spilled = too_large = 0
    for name in arguments.only or CASES:
        for case, function, values in CASES[name]():
            if arguments.case not in case:
                continue
            with recorded() as launches:
                out = function(*values)
                outs = [each for each in (out if isinstance(out, tuple) else (out,)) if each.requires_grad]
                if outs:
                    torch.stack([each.sum() for each in outs]).sum().backward()
            for launch in launches:
                registers, stack, shared = launch.compile(arguments.capability)
                spilled, too_large = spilled + (stack > 0), too_large + (shared > device.SHARED_BYTES)
                kernel = f"{name} {launch.kernel.__name__.strip('_')}"
                print(f"{kernel:<28}{case:<40} {launch.warps} warps, {launch.stages} stages: {registers:>3} registers, "
                      f"{stack} bytes spilled, {shared:,} bytes shared", flush=True)
    if spilled or too_large:
        sys.exit(f"{spilled} launches spill registers, {too_large} do not fit into shared memory")


if __name__ == "__main__":
    main()
