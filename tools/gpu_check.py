"""Check every kernel on this machine's GPU and time it beside its peers, in less than ten minutes.

    python tools/gpu_check.py [exact] [attention] [experts] [scan] [step]

Writes <device>.json and .md into tools/benchmark/results; a part run alone replaces its own figures. Times are medians
of milliseconds; a peer that cannot do what is asked has its reason in place of a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moescale.config import parse_config
from moescale.data.batches import Batch
from moescale.engine.native import NativeEngine
from moescale.layers.positions import alibi_slopes
from moescale.moe.routers.token_choice import MixtralRouter
from moescale.moe.routing import Routing, sort_by_expert
from moescale.ops import expert_feed_forward_triton
from moescale.ops.attention import attention
from moescale.ops.expert_feed_forward_triton import BACKWARDS, fused_experts
from moescale.ops.grouped_gemm import grouped_gemm_reference
from moescale.ops.head_losses import head_losses, head_losses_reference
from moescale.ops.permute import permute, unpermute
from moescale.ops.rms_norm import rms_norm, rms_norm_reference
from moescale.ops.rotary import rotate, rotate_reference
from moescale.ops.router import route_reference
from moescale.ops.scan import selective_scan, selective_scan_reference
from moescale.parallel.mesh import start_mesh
from moescale.planner.cluster import peak_flops
from moescale.planner.count import count_parameters, model_flops_per_token

RESULTS = Path(__file__).parent / "benchmark/results"
Row = dict[str, Any]
BFLOAT16 = torch.bfloat16


def median_ms(call: Callable[[], Any], inputs: tuple[Tensor, ...] = ()) -> float | str:
    """Time it with a cold L2 cache. -> milliseconds, or why it cannot be"""
    from triton.testing import do_bench

    try:
        return float(do_bench(call, warmup=20, rep=60, grad_to_none=list(inputs) or None, return_mode="median"))
    except (RuntimeError, ValueError, ImportError) as error:
        return str(error).splitlines()[0][:80]


def both_ms(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[float | str, float | str]:
    """Time both. -> seconds of forward; of forward and backward"""
    def step() -> None:
        out = function(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(torch.ones_like(out))

    return median_ms(lambda: function(*inputs)), median_ms(step, inputs)


def peak_mb(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    """Measure the most bytes that forward and backward hold next to the inputs."""
    for x in inputs:
        x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*inputs).sum().backward()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def randn(*shape: int, dtype: torch.dtype = BFLOAT16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_()


def error(ours: Callable[..., Any], exact: Callable[..., Any], inputs: tuple[Tensor, ...]) -> float:
    """Find the worst relative error, by norm, of outputs and gradients against float64."""
    results = []
    for function, wide in ((ours, False), (exact, True)):
        given = [x.detach().double().requires_grad_() if wide else x.detach().clone().requires_grad_() for x in inputs]
        outs = function(*given)
        outs = outs if isinstance(outs, tuple) else (outs,)
        torch.manual_seed(1)
        grads = [torch.randn(out.shape, device="cuda").to(inputs[0].dtype).to(out.dtype) for out in outs]
        results.append([*outs, *torch.autograd.grad(outs, given, grads)])
    with torch.no_grad():
        return max(float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(*results, strict=True))


def exact() -> list[Row]:
    """Every kernel against float64, in bfloat16 and float32, in memory that torch fills with NaN before."""
    rows: list[Row] = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    for dtype, usual in ((BFLOAT16, 2e-2), (torch.float32, 2e-5)):
        for name, ours, reference, inputs in exact_cases(dtype):
            bound, worst = usual, error(ours, reference, inputs)
            row = {"kernel": name, "dtype": str(dtype)[6:], "error": worst, "bound": bound}
            if name == "attention":
                row["error of sdpa"] = sdpa = error(lambda *qkv: attention(*qkv, backend="sdpa"), reference, inputs)
                row["bound"] = bound = max(1.2 * sdpa, 2e-5)
            rows.append({**row, "passed": worst <= bound})
    torch.use_deterministic_algorithms(False)
    return rows


def exact_cases(dtype: torch.dtype) -> list[tuple[str, Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]]:
    from moescale.ops import grouped_gemm_triton
    from moescale.ops.router_triton import route

    positions = (torch.arange(700, device="cuda") % 300).expand(2, -1)
    slopes, qkv = alibi_slopes(8).cuda(), tuple(randn(2, 700, heads, 64, dtype=dtype) for heads in (8, 2, 2))
    hidden: dict[str, Any] = {"positions": positions, "window": 200, "alibi_slopes": slopes}
    routing = routing_of(500, 8, 2, idle=2)
    counts, weights = routing.tokens_per_expert, [randn(8, 192, 128, dtype=dtype, scale=0.1) for _ in range(2)]
    experts = (randn(500, 128, dtype=dtype), *weights, randn(8, 128, 192, dtype=dtype, scale=0.1),
               routing.weight.requires_grad_())
    odd = (randn(500, 60, dtype=dtype), *(randn(8, 100, 60, dtype=dtype, scale=0.1) for _ in range(2)),
           randn(8, 60, 100, dtype=dtype, scale=0.1), routing.weight.clone().requires_grad_())
    valid, targets = torch.rand(4, 250, device="cuda") < 0.9, torch.randint(3000, (500,), device="cuda")
    scan = (randn(2, 200, 64, dtype=dtype), torch.rand(2, 200, 64, device="cuda").requires_grad_(),
            (-torch.rand(64, 16, device="cuda")).requires_grad_(), *(randn(2, 200, 16, dtype=dtype) for _ in range(2)),
            randn(64, dtype=torch.float32))
    cosine, sine = (f(torch.rand(2, 350, 1, 32, device="cuda")).to(dtype) for f in (torch.cos, torch.sin))
    return [
        ("attention", lambda *x: attention(*x, backend="triton"), lambda *x: attention(*x, backend="reference"), qkv),
        ("attention, all", lambda *x: attention(*x, **hidden, backend="triton"),
         lambda *x: attention(*x, **hidden, backend="reference"), qkv),
        ("grouped GEMM", lambda r, w: grouped_gemm_triton.grouped_gemm(r, w, counts),
         lambda r, w: grouped_gemm_reference(r, w, counts),
         (randn(1000, 128, dtype=dtype), weights[0])),
        ("experts, wide", partial(fused_wide, routing), partial(apart, grouped_gemm_reference, routing), experts),
        *((f"{name}, {backward}", partial(fused, routing, backward=backward),
           partial(apart, grouped_gemm_reference, routing), given)
          for name, given in (("experts", experts), ("experts, odd sizes", odd)) for backward in BACKWARDS),
        ("router", lambda x: route(x, valid, 2, True)[:3], lambda x: route_reference(x, valid, 2, True)[:3],
         (randn(4, 250, 64, dtype=torch.float32),)),
        ("norm", lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5),
         (randn(300, 1000, dtype=dtype), randn(1000, dtype=dtype))),
        ("rotary", lambda x: rotate(x, cosine, sine), lambda x: rotate_reference(x, cosine.double(), sine.double()),
         (randn(2, 350, 8, 64, dtype=dtype),)),
        ("losses", lambda x, w: head_losses(x, w, targets, chunk=128),
         lambda x, w: head_losses_reference(x, w, targets, 1.0),
         (randn(500, 64, dtype=dtype, scale=0.3), randn(3000, 64, dtype=dtype, scale=0.3))),
        ("scan", selective_scan, selective_scan_reference, scan),
    ]


def routing_of(tokens: int, experts: int, top_k: int, idle: int = 0) -> Routing:
    """idle: so many of the experts, the first ones, get no token."""
    expert = torch.rand(tokens, experts - idle, device="cuda").topk(top_k).indices + idle
    return sort_by_expert(expert, torch.rand(tokens, top_k, device="cuda"), torch.ones_like(expert, dtype=torch.bool),
                          experts)


def fused(
    routing: Routing, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weight: Tensor, *, backward: str = BACKWARDS[0]
) -> Tensor:
    return fused_experts(x, gate, up, down, replace(routing, weight=weight), backward=backward)


def fused_wide(routing: Routing, *inputs: Tensor) -> Tensor:
    """The mixture with the passes of wide experts."""
    with mock.patch.object(expert_feed_forward_triton, "WIDE", 0):
        return fused(routing, *inputs)


def apart(grouped: Callable[..., Tensor], routing: Routing, x: Tensor, gate: Tensor, up: Tensor, down: Tensor,
          weight: Tensor) -> Tensor:
    """The mixture step by step, with this grouped product."""
    rows, counts = permute(x, routing.token, routing.row), routing.tokens_per_expert
    rows = grouped(F.silu(grouped(rows, gate, counts)) * grouped(rows, up, counts), down, counts)
    return unpermute(rows, weight, routing.token, routing.row)


def torch_grouped(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight.mT, offs=tokens_per_expert.cumsum(0).int())


def torch_alone(routing: Routing, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """The mixture with torch's own grouped product and its own ways to take rows and to add them up."""
    rows, counts = x[routing.token], routing.tokens_per_expert
    rows = F.silu(torch_grouped(rows, gate, counts)) * torch_grouped(rows, up, counts)
    rows = torch_grouped(rows, down, counts) * weight.unsqueeze(1).to(x.dtype)
    return torch.zeros_like(x).index_add(0, routing.token, rows)


def attention_part() -> list[Row]:
    """Causal attention, 32k tokens, 32 heads on 8: ours and the peers; a window and ALiBi at 32k."""
    def ours(backend: str, **arguments: Any) -> Callable[..., Tensor]:
        return lambda q, k, v: attention(q, k, v, backend=backend, **arguments)  # type: ignore[arg-type]

    def sdpa(kernel: SDPBackend) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return attention(q, k, v, backend="sdpa")
        return call

    torch._dynamo.config.recompile_limit = 64  # FlexAttention is compiled for each shape
    plain = {"triton": ours("triton"), "sdpa": ours("sdpa"), "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
             "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "flex": ours("flex")}
    slopes = alibi_slopes(32).cuda()
    hidden: dict[str, dict[str, Any]] = {"window 4096": {"window": 4096}, "alibi": {"alibi_slopes": slopes}}
    rows = []
    for head_dim in (64, 128):
        for seq in (2048, 4096, 8192, 16384, 32768):
            calls = dict(plain)
            if seq == 32768:
                calls |= {f"{name}, {case}": ours(name, **arguments) for case, arguments in hidden.items()
                          for name in ("triton", "flex")}
            inputs = tuple(randn(32768 // seq, seq, heads, head_dim) for heads in (32, 8, 8))
            flops = 2 * 32768 * seq * 32 * head_dim  # causal: half of 4 seq^2
            for name, call in calls.items():
                forward, both = both_ms(call, inputs)
                row = {"seq": seq, "head_dim": head_dim, "backend": name, "forward, ms": forward, "both, ms": both}
                if isinstance(forward, float) and isinstance(both, float) and "," not in name:
                    row |= {"forward, TFLOP/s": flops / forward / 1e9, "both, TFLOP/s": 3.5 * flops / both / 1e9}
                rows.append(row | ({"peak, MB": peak_mb(call, inputs)} if isinstance(both, float) else {}))
    return rows


def experts_part() -> list[Row]:
    """A mixture's experts beside torch's grouped product, a loop of products, and a dense layer of equal FLOPs."""
    rows: list[Row] = []
    for size, (tokens, d_model, d_ff, num, top_k) in {
        "Mixtral 8x7B": (16384, 4096, 14336, 8, 2), "fine-grained": (32768, 2048, 768, 128, 8),
        "finer": (24576, 1536, 256, 128, 8)
    }.items():
        routing, scale = routing_of(tokens, num, top_k), d_model**-0.5
        inputs = (randn(tokens, d_model), *(randn(num, d_ff, d_model, scale=scale) for _ in range(2)),
                  randn(num, d_model, d_ff, scale=scale), routing.weight.requires_grad_())
        wide = [randn(top_k * d_ff, d_model, scale=scale) for _ in range(2)]
        dense = (inputs[0], *wide, randn(d_model, top_k * d_ff, scale=scale))
        calls: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = [
            *((f"fused, {backward}", partial(fused, routing, backward=backward), inputs) for backward in BACKWARDS),
            ("grouped_mm, our permutation", partial(apart, torch_grouped, routing), inputs),
            ("grouped_mm, torch alone", partial(torch_alone, routing), inputs),
            ("loop", partial(apart, grouped_gemm_reference, routing), inputs),
            ("dense", lambda x, gate, up, down: (F.silu(x @ gate.T) * (x @ up.T)) @ down.T, dense),
        ]
        for name, call, given in calls:
            forward, both = both_ms(call, given)
            rows.append({"size": size, "experts": name, "forward, ms": forward, "both, ms": both})
            if isinstance(both, float):
                rows[-1]["both, TFLOP/s"] = 18 * tokens * top_k * d_model * d_ff / both / 1e9
    return rows


def scan_part() -> list[Row]:
    """The scan beside position by position, and mamba_ssm's where it is installed."""
    rows: list[Row] = []
    for seq in (512, 8192):
        u, delta = randn(4, seq, 2048), torch.rand(4, seq, 2048, device="cuda").requires_grad_()
        a, d = (-torch.rand(2048, 16, device="cuda")).requires_grad_(), randn(2048, dtype=torch.float32)
        inputs = (u, delta, a, randn(4, seq, 16), randn(4, seq, 16), d)
        calls: dict[str, Callable[..., Any]] = {"triton": selective_scan}
        if seq == 512:
            calls["plain"] = selective_scan_reference
        try:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # type: ignore[import-not-found]

            calls["mamba_ssm"] = lambda u, delta, a, b, c, d: selective_scan_fn(
                u.mT, delta.to(u.dtype).mT, a, b.mT, c.mT, d).mT
        except ImportError:
            pass
        for name, call in calls.items():
            forward, both = both_ms(call, inputs)
            rows.append({"seq": seq, "scan": name, "forward, ms": forward, "both, ms": both})
    return rows


def force_balance(settle: Callable[..., Any]) -> Callable[..., Any]:
    """Let a router choose experts in turns, and weigh them as it would."""
    def forced(self: MixtralRouter, logits: Tensor, token_id: Tensor, valid_whole: Tensor) -> Any:
        turns = token_id.unsqueeze(-1) * self.top_k + torch.arange(self.top_k, device=logits.device)
        favour = torch.zeros_like(logits).scatter(-1, turns % logits.shape[-1], 1e4)
        return settle(self, logits + favour, token_id, valid_whole)

    return forced


def step_part() -> list[Row]:
    """The whole training step of a Mixtral-style model of about 1B active parameters, in bfloat16."""
    batch, seq = 4, 4096  # of a micro-batch
    config = parse_config({
        "model": {"vocab_size": 32000, "d_model": 2048, "num_layers": 16},
        "attention": {"num_heads": 16, "num_kv_heads": 4, "head_dim": 128, "rope_theta": 1e6},
        "moe": {"num_experts": 8, "top_k": 2, "d_ff": 3584}, "precision": {"compute": "bfloat16"},
        "data": {"seq_len": seq, "global_batch": batch}, "optim": {"lr": 1e-4},
    }, "gpu_check").for_world(1)
    engine = NativeEngine(config, start_mesh(config))
    tokens = torch.randint(32000, (batch, seq + 1), device="cuda")
    token_id = torch.arange(batch * seq, device="cuda").view(batch, seq)
    data = Batch(tokens[:, :-1], tokens[:, 1:], token_id % seq, token_id)
    rows: list[Row] = []
    learned = MixtralRouter.settle
    for routing, passes in itertools.product(("learned", "forced"), (1, 4)):
        seconds = []
        with mock.patch.object(MixtralRouter, "settle", force_balance(learned) if routing == "forced" else learned):
            for _ in range(10):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                engine.forward_backward([data] * passes)
                engine.step()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begin)
        median = sorted(seconds[3:])[3]
        flops = model_flops_per_token(config) * passes * batch * seq / median
        peak = peak_flops(torch.cuda.get_device_name(), "bfloat16")
        rows.append({"active parameters": count_parameters(config).active, "routing": routing, "micro-batches": passes,
                     "step, ms": 1000 * median, "tokens/s": passes * batch * seq / median,
                     "model TFLOP/s": flops / 1e12, "mfu": peak and flops / peak,
                     "peak memory, GB": torch.cuda.max_memory_allocated() / 1e9})
    return rows


PARTS = {"exact": exact, "attention": attention_part, "experts": experts_part, "scan": scan_part, "step": step_part}


def write(device: str, results: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{device.replace(' ', '_')}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept |= {"device": device, "torch": torch.__version__, **results}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    lines = [f"# {device}, torch {torch.__version__}"]
    for part in PARTS:
        rows = kept.get(part, [])
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            lines += ["", f"## {part}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in rows:
            cells = [row.get(column, "") for column in columns]
            lines.append(f"| {' | '.join(f'{x:.4g}' if isinstance(x, float) else str(x) for x in cells)} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all by default")
    chosen = parser.parse_args().parts or list(PARTS)
    if wrong := set(chosen) - set(PARTS):
        parser.error(f"no part is named {', '.join(sorted(wrong))}: use {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        sys.exit("no GPU here: tools/gpu_check.py needs one; tools/compile_kernels.py and the tests do without")
    results = {}
    for part in chosen:
        begin = time.perf_counter()
        torch.manual_seed(0)
        results[part] = PARTS[part]()
        write(torch.cuda.get_device_name(), results)
        torch.cuda.empty_cache()
        print(f"{part}: {time.perf_counter() - begin:.0f} s")
    if failed := [row["kernel"] for row in results.get("exact", []) if not row["passed"]]:
        sys.exit(f"too far from float64: {', '.join(failed)}")


if __name__ == "__main__":
    main()
