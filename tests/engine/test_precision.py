"""Every tensor of a step has the precision that docs/precision.md says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moescale.comm.collectives import local_tensor
from moescale.config import Config, parse_config
from moescale.engine.native import NativeEngine
from moescale.layers.exact import Exact
from moescale.mixers.base import Mixer
from moescale.model.block import Block
from moescale.moe.layer import MoELayer
from moescale.optim.optimizer import build_optimizer
from moescale.parallel.mesh import start_mesh
from moescale.parallel.ranks import run_ranks
from moescale.verify.observation import make_batches

PAGE = Path(__file__).parent.parent.parent / "docs" / "precision.md"
TABLE = dict(re.findall(r"^\| ([^|]+?) \| (float32|float64|compute) \|", PAGE.read_text(), re.MULTILINE))
DTYPES = {"compute": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

# Operations that decide about precision: products, and functions in which rounding does harm.
PRODUCTS = r"(mm|bmm|addmm|baddbmm|mv|_grouped_mm|_scaled_dot_product_flash_attention_for_cpu(_backward)?)"
FUNCTIONS = (r"(_?(log_)?softmax(_backward_data)?|logsumexp|logaddexp|exp_?|log|rsqrt_?|sqrt|pow_?|linalg_vector_norm|"
             r"native_layer_norm(_backward)?|sum|mean|amax|cumsum|cos|sin|softplus|sigmoid|special_entr)")
RULES = (  # where an operation of PRODUCTS or FUNCTIONS runs, and which row of the table its results belong to
    (r"forward .*Router .*", "router"),
    (r"forward .*AttentionCore .*", "attention scores"),
    (r"backward _BlocksBackward .*", "attention scores"),
    (r"forward .*(RMS|Layer)Norm .*", "norm statistics"),
    (r"backward (_(Compiled)?RMSNorm|NativeLayerNorm)Backward\d? .*", "norm statistics"),
    (r"forward .*Attention (pow|cos|sin)", "rotary angles"),
    (r"forward .*Attention exp2?", "attention scores"),
    (r"forward .*(Linear|Experts|FeedForward) " + PRODUCTS, "products of matrices"),
    (r"forward .*(LanguageModel|Embedding) " + PRODUCTS, "logits"),
    (r"forward .*(LanguageModel|Embedding) " + FUNCTIONS, "log-normalisers and losses"),
    (r"backward _HeadLossesBackward " + PRODUCTS, "products of matrices"),
    (r"backward _HeadLossesBackward " + FUNCTIONS, "log-normalisers and losses"),
    (r"backward (Mm|GroupedMm|Bmm)Backward0 .* from router", "router"),
    (r"backward (Mm|GroupedMm|Bmm)Backward0 .*", "products of matrices"),
    (r"backward (Softmax|Logsumexp|Pow|Exp)Backward\d .*", "router"),
    (r"backward MulBackward0 sum", "weights of a token's experts"),
    (r"accounting .*|forward .*MoELayer sum", "sums of a step"),
)


class Asked(TorchDispatchMode):
    """Asks each result of each operation. faults: what departs from the table; rows: those that were met."""

    def __init__(self, engine: NativeEngine) -> None:
        super().__init__()
        self.places: list[str] = []
        self.faults: set[str] = set()
        self.rows: set[str] = set()
        self.phase = "forward"
        self.parameters: dict[int, bool] = {}  # address -> whether it is exact
        for module in engine.model.modules():
            for parameter in module.parameters(recurse=False):
                self.parameters[local_tensor(parameter).data_ptr()] = isinstance(module, Exact)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]
        if func.namespace in ("c10d", "_c10d_functional"):
            self._ask_ranks(name, inputs)
        elif name == "_to_copy":
            self._ask_cast(inputs, outputs)
        elif re.fullmatch(f"{PRODUCTS}|{FUNCTIONS}", name):
            self._ask_function(name, inputs, outputs)
        elif name.startswith("_fused_adam"):
            self.ask("weights", *inputs)  # with gradients and moments, all of one precision
        elif len({x.dtype for x in inputs}) == 1 and not re.search("empty|zeros|ones", name) and any(
                x.dtype != inputs[0].dtype for x in outputs):
            self.faults.add(f"{name} in {self.place()} makes {outputs[0].dtype} of {inputs[0].dtype}")
        return result

    def place(self) -> str:
        node = torch._C._current_autograd_node()
        if node is not None:
            return f"backward {node.name()}"
        return f"{self.phase} {'/'.join(self.places[-2:])}" if self.places or self.phase != "forward" else "accounting"

    def ask(self, row: str, *tensors: Tensor) -> None:
        self.rows.add(row)
        for tensor in tensors:
            if tensor.dtype != DTYPES[TABLE[row]]:
                self.faults.add(f"{row}: {tensor.dtype} in {self.place()}")

    def _ask_function(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if not outputs:
            return  # of integers
        place = self.place()
        if self.phase == "step":
            if name == "linalg_vector_norm" and inputs[0].dtype == torch.float32:
                return self.ask("gradient norm by row", *outputs)
            return self.ask("gradient norm", *outputs)
        if "Router" in place and outputs[0].dtype == torch.float64:
            return self.ask("sums of a step", *outputs)
        of_router = place.startswith("backward Mm") and any(EXPERTS in x.shape for x in inputs)
        key = f"{place} {name}" + (" from router" if of_router else "")
        row = next((row for pattern, row in RULES if re.fullmatch(pattern, key)), None)
        if row is None:
            self.faults.add(f"no row for {key}: {outputs[0].dtype}")
        else:
            self.ask(row, *outputs)

    def _ask_cast(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        for source, cast in zip(inputs, outputs, strict=False):
            exact = self.parameters.get(source.data_ptr())
            if self.phase == "forward" and exact is not None and source.dtype != cast.dtype:
                self.ask("exact weights" if exact else "casts of weights", cast)
            elif cast.dtype not in DTYPES.values():
                self.faults.add(f"a cast to {cast.dtype} in {self.place()}")

    def _ask_ranks(self, name: str, inputs: list[Tensor]) -> None:
        node = torch._C._current_autograd_node()
        if "allgather" in name or "all_gather" in name:
            for tensor in inputs:  # of exact weights, in units of their own
                self.rows.add("gathered weights")
                if tensor.dtype not in (DTYPES[TABLE["gathered weights"]], DTYPES[TABLE["exact weights"]]):
                    self.faults.add(f"gathered weights: {tensor.dtype}")
        elif "reduce_scatter" in name or (node is not None and "allreduce" in name):
            self.ask("reduced gradients", *inputs)
        elif "alltoall" in name:
            for tensor in inputs:
                self.ask("exchanged features" if tensor.shape[-1] == D_MODEL else "exchanged weights", tensor)
        elif "allreduce" in name and self.phase != "forward":
            self.ask("gradient norm", *inputs)


EXPERTS, D_MODEL = 6, 32  # sizes by which tensors are told apart
BASE: dict[str, Any] = {
    "data": {"seq_len": 24, "global_batch": 4, "micro_batch": 2},
    "model": {"vocab_size": 264, "d_model": D_MODEL, "num_layers": 2},
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "window": 8},
    "feed_forward": {"d_ff": 64}, "optim": {"weight_decay": 0.1},
    "moe": {"num_experts": EXPERTS, "d_ff": 48, "num_shared_experts": 1, "jitter": 0.01, "expert_dropout": 0.1,
            "router_z_coefficient": 1e-3},
    "precision": {"compute": "bfloat16"},
}
CASES: dict[str, dict[str, Any]] = {
    "rope, rms norm": {"model": {"pattern": [{"channel_mixer": "feed_forward"}, {"channel_mixer": "moe"}]}},
    "alibi, layer norm, switch": {
        "model": {"norm": "layernorm", "tied_embeddings": True, "z_loss_coefficient": 1e-4},
        "attention": {"positions": "alibi", "global_tokens": 2},  # whose scores are no compiled function's alone
        "moe": {"router": "switch", "top_k": 1, "capacity_factor": 1.25, "activation": "gelu"}},
}


def config_of(case: str, **parallel: int) -> Config:
    groups = {group: {**BASE.get(group, {}), **CASES[case].get(group, {})} for group in {**BASE, **CASES[case]}}
    return parse_config({**groups, "parallel": parallel}, "test")


@contextmanager
def followed(engine: NativeEngine, asked: Asked) -> Iterator[None]:
    """Keep the stack of modules, and ask what goes from one to the next and the gradients that come back."""
    handles = []

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
        asked.places.pop()
        features = outputs[0] if isinstance(outputs, tuple) else outputs
        if isinstance(module, Block | Mixer | MoELayer) or "Norm" in type(module).__name__:
            asked.ask("features", features)
            if features.requires_grad:
                features.register_hook(lambda grad: asked.ask("gradients of features", grad))

    for module in engine.model.modules():
        handles.append(module.register_forward_pre_hook(lambda module, _: asked.places.append(type(module).__name__)))
        handles.append(module.register_forward_hook(leave))
    yield
    for handle in handles:
        handle.remove()


def step(case: str, **parallel: int) -> tuple[set[str], set[str]]:
    """Take a step of two micro-batches. Returns what departs from the table, and the rows that were met."""
    world = 2 if parallel else 1
    config = config_of(case, **parallel).for_world(world)
    engine = NativeEngine(config, mesh := start_mesh(config))
    batch = make_batches(config, 0)
    rows = [slice(start, start + 2) for start in range(0, 4, 2)][mesh.batch_rank :: mesh.batch_size]
    parts = [type(batch)(*(tensor[part] for tensor in vars(batch).values())) for part in rows]
    asked = Asked(engine)
    with followed(engine, asked), asked:
        engine.forward_backward(parts)
        for parameter in engine.parameters().values():
            asked.ask("weights", parameter)
            if parameter.grad is not None:
                asked.ask("gradients of weights", parameter.grad)
        asked.phase = "step"
        engine.step()
    for state in engine.optimizer.state.values():
        asked.ask("moments", *(tensor for name, tensor in state.items() if name != "step"))
    return asked.faults, asked.rows


BETWEEN_RANKS = {"gathered weights", "reduced gradients", "exchanged features", "exchanged weights"}


def test_every_tensor_of_a_step() -> None:
    met: set[str] = set()
    for case in CASES:
        faults, rows = step(case)
        assert not faults, case
        met |= rows
    assert met == set(TABLE) - BETWEEN_RANKS - {"exact weights"}, "a row of the table that no tensor belongs to"


def _step_of_two_ranks() -> tuple[set[str], set[str]]:
    return step("rope, rms norm", ep=2)


def test_every_tensor_between_ranks() -> None:
    for faults, rows in run_ranks(2, _step_of_two_ranks, timeout_seconds=60):
        assert not faults
        assert rows >= BETWEEN_RANKS


def _rounded_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16()).float()


def _rounded_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


@pytest.mark.parametrize(("planted", "instead", "row"), [
    ("moescale.moe.routers.base.F", SimpleNamespace(linear=_rounded_linear), "exact weights"),
    ("moescale.layers.norm.rms_norm", _rounded_norm, "norm statistics"),
    ("moescale.engine.native.build_optimizer",
     lambda model, spec, config: build_optimizer(model.bfloat16(), spec, config), "moments"),
])
def test_a_planted_fault_is_found(planted: str, instead: Any, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, instead)
    faults, _ = step("rope, rms norm")
    assert any(fault.startswith(f"{row}: torch.bfloat16") for fault in faults), faults
