"""Megatron-Core without a GPU: what asks for one is answered with the processor, and its own code computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from moescale.engine import megatron_settings
from tests.support.models import DENSE, MIXED

SHARED = {"num_shared_experts": 2, "router": "sigmoid_bias"}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of a model, and of its mixtures
    "dense": (DENSE | {"tied_embeddings": True}, {}),
    "gelu": (DENSE | {"activation": "gelu", "num_kv_heads": 4}, {}),
    "mixture": ({}, {}),
    "mixed": (MIXED, {"normalize_weights": False}),
    "shared": ({"positions": "none"}, SHARED | {"routed_scaling": 2.5, "num_expert_groups": 4, "top_k_groups": 2}),
}


class _OnProcessor(TorchFunctionMode):
    """Makes tensors for CUDA on the processor, whose types call themselves CUDA's."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = dict(named or {})
        if function is torch.Tensor.cuda:
            return args[0]
        if str(named.get("device", "")).startswith("cuda"):
            named["device"] = "cpu"
        result = function(*args, **named)
        if function is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _Stream(nullcontext[None]):
    """Stands for a stream of a GPU, where what was asked for first is done first."""

    def __init__(self, *_: object) -> None:
        super().__init__()

    def wait_stream(self, other: _Stream) -> None:
        """Do nothing: it is done."""

    def record_event(self) -> _Stream:
        """Stand for the event, too."""
        return self

    def wait_event(self, event: _Stream) -> None:
        """Do nothing: it is done."""

    def synchronize(self) -> None:
        """Do nothing: it is done."""


def on_processor() -> None:
    """Let this process, which does nothing else, take its processor for a GPU from here on."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random as draws
    from megatron.core.transformer.moe import moe_utils

    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.synchronize = cuda.empty_cache = cuda.set_device = lambda *_: None
    cuda.Stream = cuda.stream = cuda.current_stream = _Stream
    draws.CudaRNGStatesTracker.fork = lambda self, name=None: nullcontext()
    tensor_parallel.model_parallel_cuda_manual_seed = lambda *_, **__: None
    moe_utils.te_general_gemm = None  # its name is missing without Transformer Engine
    exchange = dist.all_to_all_single

    def exchange_numbers(*args: Any, **named: Any) -> Any:
        """Take the sizes as lists; they are arrays where they come from a GPU, and tensors here."""
        return exchange(*args, **{key: value.tolist() if key.endswith("sizes") and isinstance(value, Tensor) else value
                                  for key, value in named.items()})

    distributed: Any = dist
    distributed.all_to_all_single = exchange_numbers
    torch.compiler.set_stance("force_eager")  # small functions would be compiled for longer than the tests run
    megatron_settings.check_device = lambda: None
    _OnProcessor().__enter__()


@contextmanager
def fake_ranks(rank: int, size: int, **degrees: int) -> Iterator[None]:
    """Be one of several ranks that are not there, in Megatron's groups of these degrees."""
    from megatron.core import parallel_state

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(**degrees, create_gloo_process_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
