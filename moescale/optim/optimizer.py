"""AdamW with decoupled decay on matrices, none on norms and embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moescale.comm.collectives import local_tensor
from moescale.config import OptimConfig

STATE = ("exp_avg", "exp_avg_sq")


class LocalAdamW(torch.optim.AdamW):
    """Updates element by element what lies on this rank: nothing here depends on how a parameter is cut."""

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """Gather what the group's step works on; torch fills the lists with parameters, gradients and their state."""
        result = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local_tensor(tensor) for tensor in tensors]
        return result


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Make the optimizer, its state at zero so that a checkpoint can be read into it."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and "embedding" not in name].append(parameter)
    optimizer = LocalAdamW(
        [{"params": params, "weight_decay": config.weight_decay * decays} for decays, params in groups.items()],
        lr=config.lr, betas=config.betas, eps=config.eps, fused=True,
    )
    for parameter in model.parameters():
        optimizer.state[parameter] = {name: torch.zeros_like(parameter.data) for name in STATE}
        optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)
    return optimizer
