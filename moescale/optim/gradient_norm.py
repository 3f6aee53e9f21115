"""One gradient norm over all parameters, wherever they lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most max_norm; each element of each weight counts once.

    max_norm: None leaves them as they are. -> the norm before, scalar float32
    """
    by_axes: dict[Any, list[Tensor]] = defaultdict(list)  # by the mesh, and its axes over which a gradient is cut
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor):
            axes = tuple(axis for axis, placement in enumerate(grad.placements) if isinstance(placement, Shard))
            by_axes[grad.device_mesh, axes].append(grad.to_local())
        elif grad is not None:
            by_axes[None, ()].append(grad)
    squares = []
    for (mesh, axes), grads in by_axes.items():
        # row by row, then in float64: over a whole tensor at once, float32 loses five digits
        norms = [torch.linalg.vector_norm(torch.linalg.vector_norm(grad, dim=-1).double()) for grad in grads]
        square = torch.stack(norms).square().sum()
        for axis in axes:
            dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    norm = torch.stack(squares).sum().sqrt().float()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grads in by_axes.values():
            torch._foreach_mul_(grads, scale)
    return norm
