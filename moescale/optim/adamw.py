"""AdamW with decoupled weight decay (Loshchilov and Hutter, 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moescale.comm.collectives import local_tensor
from moescale.config import OptimConfig
from moescale.ops import native
from moescale.optim.base import Groups
from moescale.optim.rounding import Draws, high_bits, store_rounded

CHUNK_NUMBERS = {"cpu": 1 << 17}  # elements updated at a time, whose copies fit a processor's cache
LARGE_CHUNK_NUMBERS = 1 << 24


class LocalAdamW(torch.optim.AdamW):
    """Updates element by element what lies on this rank: nothing here depends on how a parameter is cut."""

    moments: torch.dtype | None = None  # the parameters' own

    def __init__(self, groups: Groups, config: OptimConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            self.state[parameter] = {
                **{name: torch.zeros_like(parameter.data, dtype=self.moments) for name in ("exp_avg", "exp_avg_sq")},
                "step": torch.zeros((), device=parameter.device),
            }

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """Gather what the group's step works on; torch fills the lists with parameters, gradients and their state."""
        result = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local_tensor(tensor) for tensor in tensors]
        return result


class RoundedAdamW(LocalAdamW):
    """Keeps moments in bfloat16, and computes with them as `LocalAdamW` does, on float32 copies of some at a time.

    Weights are updated by moments that are not yet rounded, as in Transformer Engine's FusedAdam, which rounds to
    nearest what it stores; here rounding is stochastic. On a processor with a compiler that is one pass.
    """

    moments = torch.bfloat16

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self._update(name, parameter, parameter.grad, group)

    def _update(self, name: str, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        step = state["step"]
        step += 1
        weight, gradient, *moments = (_by_rows(tensor) for tensor in (
            parameter.data, grad, state["exp_avg"], state["exp_avg_sq"]))
        draws = Draws(name, parameter.data)
        if (weight.numel() and weight.dtype == gradient.dtype == torch.float32 and native.runs(weight)
                and all(moment.dtype == self.moments for moment in moments)):
            beta1, beta2, rate, eps = map(float, (*group["betas"], group["lr"], group["eps"]))
            number = step.item()
            native.call("adamw", weight.dtype, native.parts(*weight.shape), weight, gradient.contiguous(), *moments,
                        draws.firsts(step), *weight.shape, 1 - rate * group["weight_decay"], 1 - beta1, beta2,
                        1 - beta2, rate / (1 - beta1**number), (1 - beta2**number) ** 0.5, eps)
            return
        numbers = CHUNK_NUMBERS.get(weight.device.type, LARGE_CHUNK_NUMBERS)
        size = max(1, numbers // max(1, weight.shape[1]))
        for start in range(0, len(weight), size):
            rows = slice(start, start + size)
            exact = [moment[rows].to(weight.dtype) for moment in moments]
            torch._fused_adamw_(
                [weight[rows]], [gradient[rows]], [exact[0]], [exact[1]], [], [step], lr=group["lr"],
                beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False)
            drawn = draws.of(rows, step)
            store_rounded(moments[0][rows], exact[0], drawn)
            store_rounded(moments[1][rows], exact[1], high_bits(drawn))


def _by_rows(tensor: Tensor) -> Tensor:
    """View what lies here as rows of the last dim; a scalar is one row."""
    local = local_tensor(tensor)
    return local.view(-1, local.shape[-1]) if local.numel() and local.ndim else local.view(local.numel(), 1)
