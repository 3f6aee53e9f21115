"""Sizes, weights and tokens of the MoE benchmark: the same for all that compete."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A mixture of SwiGLU experts over `tokens` of all ranks together."""

    num_experts: int
    top_k: int
    d_ff: int
    tokens: int = 4096
    d_model: int = 512


CASES = {"coarse": Case(8, 2, 1024), "fine": Case(64, 8, 128), "tiny": Case(8, 2, 64, tokens=256)}
ROUTINGS = ("balanced", "uniform", "drawn", "one_hot")
Weights = dict[str, Tensor]
"""router: [experts, d_model] float32. gate, up: [experts, d_ff, d_model]. down: [experts, d_model, d_ff]."""


def make_weights(case: Case, dtype: torch.dtype) -> Weights:
    """The router's rows are orthonormal, so that tokens can be made to want what experts one likes."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    wide = (case.num_experts, case.d_ff, case.d_model)
    router = torch.linalg.qr(torch.randn(case.d_model, case.num_experts, generator=generator)).Q.T.contiguous()
    return {"router": router, "gate": normal(*wide).to(dtype), "up": normal(*wide).to(dtype),
            "down": normal(case.num_experts, case.d_model, case.d_ff).to(dtype)}


def make_tokens(case: Case, routing: str, router: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw tokens that the router sends where `routing` says, and the gradient of what becomes of them.

    balanced: each expert gets equally many. uniform: each token wants any top_k experts. drawn: random tokens, as the
    router sees them. one_hot: all want the same top_k experts. -> x, gradient: [tokens, d_model]
    """
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(case.tokens, case.d_model, generator=generator)
    grad = torch.randn(case.tokens, case.d_model, generator=generator).to(dtype)
    logits = x @ router.T
    if routing != "drawn":
        shape = (case.tokens, case.num_experts)
        order = {
            "balanced": (torch.arange(case.tokens).unsqueeze(1) * case.top_k + torch.arange(case.num_experts)),
            "uniform": torch.rand(shape, generator=generator).argsort(1),
            "one_hot": torch.arange(case.num_experts).expand(shape),
        }[routing] % case.num_experts
        wanted = torch.zeros(shape).scatter_(1, order[:, : case.top_k], 1)
        x += (3 * wanted - 3 + 0.5 * logits.tanh() - logits) @ router
    return x.to(dtype), grad


def reference(weights: Weights, x: Tensor, grad: Tensor, top_k: int) -> dict[str, Tensor]:
    """The layer as Mixtral of Experts writes it (sec. 2.1), token by expert, in float64. -> output and gradients"""
    leaf = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    x = x.double().requires_grad_()
    chosen, expert = (x @ leaf["router"].T).topk(top_k)
    weight = chosen.softmax(-1)
    y = torch.zeros_like(x)
    for index in range(len(weights["gate"])):
        token, choice = torch.where(expert == index)
        rows = x[token]
        hidden = F.silu(rows @ leaf["gate"][index].T) * (rows @ leaf["up"][index].T)
        y = y.index_add(0, token, hidden @ leaf["down"][index].T * weight[token, choice].unsqueeze(1))
    y.backward(grad.double())
    assert x.grad is not None
    return {"output": y.detach(), "x": x.grad, **{name: _gradient(weight) for name, weight in leaf.items()}}


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad
