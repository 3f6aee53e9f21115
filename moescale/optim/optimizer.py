"""The optimizer of a model: which weights decay, how fast each learns, and where it stands in a run."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from moescale.config import OptimConfig
from moescale.optim.base import OPTIMIZERS
from moescale.spec.model import ModelSpec


def build_optimizer(model: nn.Module, spec: ModelSpec, config: OptimConfig) -> torch.optim.Optimizer:
    """Make the optimizer that the run names, its moments at zero. spec: says which weights decay, and their rates."""
    described = {".".join(weight.name): weight for weight in spec.weights()}
    groups: dict[tuple[bool, bool, float], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        weight = described[name]
        groups[weight.decays, weight.view == "sparse", weight.max_rate].append((name, parameter))
    return OPTIMIZERS[config.name].make([
        {"params": params, "weight_decay": config.weight_decay * decays, "experts": experts, "max_rate": max_rate}
        for (decays, experts, max_rate), params in groups.items()], config)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next update have this learning rate, but for weights that may not learn so fast."""
    for group in optimizer.param_groups:
        group["lr"] = min(rate, group["max_rate"])


def count_from(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Let the next update be the one after so many steps, where updates depend on their number.

    As torch's do, such an optimizer counts them in a tensor `step` beside the moments of each parameter.
    """
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)
