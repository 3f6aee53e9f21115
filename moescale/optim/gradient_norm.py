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


class SpoiltGradients:
    """Remembers, on the device, which gradients were no finite numbers in the first step that had such."""

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._spoilt: Tensor | None = None  # [parameters] bool

    def take(self, parameters: list[nn.Parameter], norms: Tensor) -> None:
        """Look at the norms of one step's gradients. norms: [parameters]"""
        spoilt = norms.isfinite().logical_not()
        before = self._spoilt
        if before is not None and len(before) == len(spoilt):
            spoilt = torch.where(before.any(), before, spoilt)
        self._parameters, self._spoilt = parameters, spoilt

    def tell(self) -> list[nn.Parameter]:
        """Return the parameters with such gradients, and forget them."""
        spoilt, self._spoilt = self._spoilt, None
        return [] if spoilt is None else [
            parameter for parameter, bad in zip(self._parameters, spoilt.tolist(), strict=True) if bad]


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float | None, *, copies: Collection[nn.Parameter] = (),
    group: dist.ProcessGroup | None = None, spoilt: SpoiltGradients | None = None,
) -> Tensor:
    """Scale all gradients so that their global norm is at most max_norm; each element of each weight counts once.

    max_norm: None leaves them as they are. copies: parameters that another rank of the group counts. group: ranks that
    hold other parameters. spoilt: remembers gradients that are no finite numbers. -> the norm before, scalar float64
    """
    parameters = list(parameters)
    not_counted = {id(parameter) for parameter in copies}
    by_axes: dict[Any, list[Tensor]] = defaultdict(list)  # by the mesh, and its axes over which a gradient is cut
    counted: dict[Any, list[nn.Parameter]] = defaultdict(list)  # the same parameters in the same order
    for parameter in parameters:
        grad = parameter.grad if id(parameter) not in not_counted else None
        if isinstance(grad, DTensor):
            axes = tuple(axis for axis, placement in enumerate(grad.placements) if isinstance(placement, Shard))
            by_axes[grad.device_mesh, axes].append(local_tensor(grad))
            counted[grad.device_mesh, axes].append(parameter)
        elif grad is not None:
            by_axes[None, ()].append(grad)
            counted[None, ()].append(parameter)
    squares, all_norms = [], []
    for (mesh, axes), grads in by_axes.items():
        # row by row, then in float64: over a whole tensor at once, float32 loses five digits
        norms = torch.stack([
            torch.linalg.vector_norm(torch.linalg.vector_norm(grad, dim=-1).double()) for grad in grads])
        all_norms.append(norms)
        square = norms.square().sum()
        for axis in axes:
            dist.all_reduce(square, group=mesh.get_group(axis))
        squares.append(square)
    if spoilt is not None:
        spoilt.take([parameter for some in counted.values() for parameter in some], torch.cat(all_norms))
    square = torch.stack(squares).sum()
    if group is not None:
        dist.all_reduce(square, group=group)
    norm = square.sqrt()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(grads, scale.to(grads[0].dtype))  # of another dtype, each would be scaled on its own
    return norm
