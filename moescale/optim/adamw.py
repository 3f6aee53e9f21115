"""AdamW with decoupled weight decay (Loshchilov and Hutter, 2019)."""

from __future__ import annotations

from typing import Any

import torch

from moescale.comm.collectives import local_tensor
from moescale.config import OptimConfig
from moescale.optim.base import Groups


class LocalAdamW(torch.optim.AdamW):
    """Updates element by element what lies on this rank: nothing here depends on how a parameter is cut."""

    def __init__(self, groups: Groups, config: OptimConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            self.state[parameter] = {
                "exp_avg": torch.zeros_like(parameter.data), "exp_avg_sq": torch.zeros_like(parameter.data),
                "step": torch.zeros((), device=parameter.device),
            }

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """Gather what the group's step works on; torch fills the lists with parameters, gradients and their state."""
        result = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local_tensor(tensor) for tensor in tensors]
        return result
