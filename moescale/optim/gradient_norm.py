"""One gradient norm over all parameters, wherever they lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moescale.optim.optimizer import mesh_of


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most max_norm; each element of each weight counts once.

    max_norm: None leaves them as they are. -> the norm before, scalar float32
    """
    by_mesh: dict[object, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh[mesh_of(parameter.grad)].append(parameter.grad)
    norms = [torch.nn.utils.get_total_norm(grads) for grads in by_mesh.values()]
    total = torch.linalg.vector_norm(torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]))
    if max_norm is not None:
        for grads in by_mesh.values():
            for grad in grads:
                local = grad.to_local() if isinstance(grad, DTensor) else grad
                local.mul_((max_norm / (total + 1e-6)).clamp(max=1.0))
    return total
