"""Adafactor (Shazeer and Stern, 2018), and PaLM's form of it (Chowdhery et al., 2023, section 5).

An update is scaled by the root mean square of what it changes, so that the learning rate is relative. Second moments
of a matrix may be kept as means of its rows and of its columns, whose product stands for them. All these means are
over whole matrices, wherever their parts lie: ranks add up sums, in one collective for all weights that they share.
Experts that are stacked in one tensor are a matrix each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, zeros

from moescale.comm.collectives import local_tensor
from moescale.config import OptimConfig
from moescale.optim.base import Groups

SHARE_EXPONENT = -0.8  # the squares of step k, from 1, have the share k^-0.8 in second moments
SQUARE_EPS = 1e-30  # added to squared gradients
SMALLEST_SCALE = 1e-3  # of a weight's root mean square, so that a weight of zeros can move


class Adafactor(torch.optim.Optimizer):
    """Updates what lies on this rank. The memory of gradients is taken for the updates."""

    def __init__(self, groups: Groups, config: OptimConfig) -> None:
        super().__init__(groups, {"lr": config.lr})
        self.momentum, self.clip_update = config.momentum, config.clip_update
        self.parts: dict[nn.Parameter, _Part] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                part = self.parts[parameter] = _Part(parameter, group["experts"], config.factored)
                self.state[parameter] = part.moments(config.momentum > 0) | {
                    "step": torch.zeros((), device=parameter.device)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, of whose number all ranks that share one must be."""
        assert closure is None
        updates = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    updates.append(_Update(self.parts[parameter], parameter, self.state[parameter], group))
        # the size of each weight, and squared gradients by rows and by columns, in one round of sums
        _add_up(total for update in updates for total in update.count())
        # second moments; those of rows are taken relative to their mean, of which each rank has some
        _add_up(total for update in updates for total in update.move_second_moments())
        # gradients become updates, whose size is limited
        _add_up(total for update in updates for total in update.divide(self.clip_update is not None))
        for update in updates:
            update.apply(self.momentum, self.clip_update)


class _Sum:
    """A sum in float64 that ranks of some groups add up."""

    def __init__(self, values: Tensor, groups: tuple[dist.ProcessGroup, ...]) -> None:
        self.values, self.groups = values.double(), groups


def _add_up(sums: Iterable[_Sum]) -> None:
    """Add up over ranks, in place: one collective for each group of ranks, in the same order on all of them."""
    by_group: dict[dist.ProcessGroup, list[Tensor]] = {}
    for total in sums:
        for group in total.groups:
            by_group.setdefault(group, []).append(total.values)
    for group, tensors in by_group.items():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


class _Part:
    """Says how a parameter is cut over ranks, and which of its dims are those of a matrix or vector."""

    def __init__(self, parameter: nn.Parameter, experts: bool, factored: bool) -> None:
        """experts: whether the first dim is of experts."""
        self.parameter = parameter.data
        self.dims = tuple(range(int(experts), parameter.ndim))
        self.factored = factored and len(self.dims) > 1
        self.shape = tuple(parameter.shape)
        self.size = math.prod(self.shape[dim] for dim in self.dims)

    def groups(self, *dims: int) -> tuple[dist.ProcessGroup, ...]:
        """List the groups of ranks that share one of these dims."""
        if not isinstance(self.parameter, DTensor):
            return ()
        wanted, mesh = {dim % len(self.shape) for dim in dims}, self.parameter.device_mesh
        return tuple(mesh.get_group(axis) for axis, placement in enumerate(self.parameter.placements)
                     if isinstance(placement, Shard) and placement.dim in wanted and mesh.size(axis) > 1)

    def moments(self, momentum: bool) -> dict[str, Tensor]:
        """Make this rank's moments, at zero."""
        moments = {"exp_avg": torch.zeros_like(self.parameter)} if momentum else {}
        if not self.factored:
            return {**moments, "exp_avg_sq": torch.zeros_like(self.parameter)}
        return {**moments, "exp_avg_sq_row": self._zeros_without(-1), "exp_avg_sq_col": self._zeros_without(-2)}

    def _zeros_without(self, dim: int) -> Tensor:
        """Make zeros that lack one dim and are cut along the others as the parameter is."""
        dim %= len(self.shape)
        shape = (*self.shape[:dim], *self.shape[dim + 1 :])
        data = self.parameter
        if not isinstance(data, DTensor):
            return torch.zeros(shape, dtype=data.dtype, device=data.device)
        placements = [_without(placement, dim) for placement in data.placements]
        return zeros(shape, dtype=data.dtype, device_mesh=data.device_mesh, placements=placements)


def _without(placement: Placement, dim: int) -> Placement:
    """Say how a tensor is cut that has lost a dim."""
    if not isinstance(placement, Shard) or placement.dim == dim:
        return Replicate()
    return Shard(placement.dim - int(placement.dim > dim))


class _Update:
    """One parameter in one step."""

    def __init__(self, part: _Part, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        self.part, self.lr, self.weight_decay = part, group["lr"], group["weight_decay"]
        assert parameter.grad is not None
        self.weight, self.grad = local_tensor(parameter.data), local_tensor(parameter.grad)
        self.state = {name: local_tensor(tensor) for name, tensor in state.items()}
        self.state["step"] += 1
        share = self.state["step"].double() ** SHARE_EXPONENT
        self.share = share.to(self.weight.dtype)  # of this step in second moments

    def count(self) -> list[_Sum]:
        """Count the squares of the weight and, of rows and columns, those of the gradient."""
        self.weight_squares = self._squares(self.weight)
        if not self.part.factored:
            return [self.weight_squares]
        squares = self.grad.square()
        self.row_squares = _Sum(squares.sum(-1), self.part.groups(-1))
        self.column_squares = _Sum(squares.sum(-2), self.part.groups(-2))
        return [self.weight_squares, self.row_squares, self.column_squares]

    def move_second_moments(self) -> list[_Sum]:
        """Move the means of squared gradients; of rows, begin to take the mean."""
        if not self.part.factored:
            moment = self.state["exp_avg_sq"]
            moment.lerp_(self.grad.square().add_(SQUARE_EPS), self.share)
            return []
        rows, columns = self.part.shape[-2:]
        for name, total, count in (("row", self.row_squares, columns), ("col", self.column_squares, rows)):
            moment = self.state[f"exp_avg_sq_{name}"]
            moment.lerp_((total.values / count + SQUARE_EPS).to(moment.dtype), self.share)
        self.row_sum = _Sum(self.state["exp_avg_sq_row"].sum(-1, keepdim=True, dtype=torch.float64),
                            self.part.groups(-2))
        return [self.row_sum]

    def divide(self, limited: bool) -> list[_Sum]:
        """Divide the gradient by the root of its second moment. limited: whether the size of the result is needed"""
        if self.part.factored:
            row, column = self.state["exp_avg_sq_row"], self.state["exp_avg_sq_col"]
            mean = self.row_sum.values / self.part.shape[-2]
            self.grad.mul_((row / mean.to(row.dtype)).rsqrt_().unsqueeze(-1)).mul_(column.rsqrt().unsqueeze(-2))
        else:
            self.grad.div_(self.state["exp_avg_sq"].sqrt())
        self.update_squares = self._squares(self.grad) if limited else None
        return [] if self.update_squares is None else [self.update_squares]

    def apply(self, momentum: float, clip_update: float | None) -> None:
        """Let the weight decay, and take the scaled update or its running mean from it."""
        scale = self.lr * self._root_mean(self.weight_squares).clamp(min=SMALLEST_SCALE)
        if clip_update is not None and self.update_squares is not None:
            scale = scale / (self._root_mean(self.update_squares) / clip_update).clamp(min=1)
        self.grad.mul_(scale.to(self.grad.dtype))
        if momentum > 0:
            self.grad = self.state["exp_avg"].lerp_(self.grad, 1 - momentum)
        self.weight.mul_(1 - self.weight_decay * self.lr**2).sub_(self.grad)

    def _squares(self, tensor: Tensor) -> _Sum:
        """Begin to add up the squares of each matrix: row by row first, for float32 loses digits over many."""
        rows = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True).double().square()
        return _Sum(rows.sum(self.part.dims, keepdim=True), self.part.groups(*self.part.dims))

    def _root_mean(self, squares: _Sum) -> Tensor:
        return (squares.values / self.part.size).sqrt()
