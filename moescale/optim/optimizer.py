"""AdamW with decoupled decay on matrices, none on norms and embeddings."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moescale.config import OptimConfig

STATE = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Make the optimizer, its state at zero so that a checkpoint can be read into it."""
    groups: dict[tuple[bool, object], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and "embedding" not in name
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups[decays, mesh].append(parameter)  # one fused call cannot mix meshes
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": config.weight_decay * decays} for (decays, _), params in groups.items()],
        lr=config.lr, betas=config.betas, eps=config.eps, fused=True,
    )
    for parameter in model.parameters():
        optimizer.state[parameter] = {name: torch.zeros_like(parameter.data) for name in STATE}
        optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)
    return optimizer
