"""One gradient norm over all parameters, wherever they lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from moescale.comm.collectives import local_tensor


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float | None, *,
    copies: Collection[nn.Parameter] = (), group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Scale all gradients so that their global norm is at most max_norm; each element of each weight counts once.

    max_norm: None leaves them as they are. copies: parameters that another rank of the group counts. group: ranks that
    hold other parameters. -> the norm before, scalar float64
    """
    parameters = list(parameters)
    not_counted = {id(parameter) for parameter in copies}
    by_axes: dict[Any, list[Tensor]] = defaultdict(list)  # by the mesh, and its axes over which a gradient is cut
    for parameter in parameters:
        grad = parameter.grad if id(parameter) not in not_counted else None
        if isinstance(grad, DTensor):
            axes = tuple(axis for axis, placement in enumerate(grad.placements) if isinstance(placement, Shard))
            by_axes[grad.device_mesh, axes].append(local_tensor(grad))
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
    square = torch.stack(squares).sum()
    if group is not None:
        dist.all_reduce(square, group=group)
    norm = square.sqrt()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(grads, scale.to(grads[0].dtype))  # of another dtype, each would be scaled on its own
    return norm
