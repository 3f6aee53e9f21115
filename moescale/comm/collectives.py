"""Communication with the group as an argument, forward and backward. A group of None is one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

Group = dist.ProcessGroup | None


def all_reduce_sum(tensor: Tensor, group: Group) -> Tensor:
    """Add up over the ranks of the group, in place; outside autograd. -> the same tensor"""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """Bring together every rank's tensor of one shape; outside autograd. -> [ranks, ...]"""
    ranks = dist.get_world_size(group)
    gathered = tensor.new_empty(ranks * len(tensor), *tensor.shape[1:])
    all_gather_single(gathered, tensor.contiguous(), group=group)
    return gathered.unflatten(0, (ranks, -1))


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """Join the ranks' positions; each rank's gradients of all of them are added up and shared out.

    x: [batch, seq/ranks, d_model]. -> [batch, seq, d_model]
    """
    return _GatherSequence.apply(x, group)


def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """Add up the ranks' values of all positions and share them out: the reverse of `gather_sequence`.

    x: [batch, seq, d_model]. -> [batch, seq/ranks, d_model]
    """
    return _ScatterSequence.apply(x, group)


def sum_over(x: Tensor, group: Group) -> Tensor:
    """Add up the ranks' values, with which each of them goes on; their gradients are added up likewise."""
    return x if group is None else _SumOver.apply(x, group)


def local_tensor(tensor: Tensor) -> Tensor:
    """Take this rank's part of a sharded tensor, with its gradient; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> tuple[Tensor, list[slice]]:
    """Find the values that lie here, and which part of each dim of the whole they are."""
    cut = [(0, size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return tensor, [slice(*bounds) for bounds in cut]
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            start, stop = cut[placement.dim]
            rank, chunk = tensor.device_mesh.get_local_rank(axis), -(-(stop - start) // tensor.device_mesh.size(axis))
            cut[placement.dim] = (min(start + rank * chunk, stop), min(start + (rank + 1) * chunk, stop))
    local = tensor.to_local()
    assert [stop - start for start, stop in cut] == list(local.shape), "a dim is cut in a way not known here"
    return local, [slice(*bounds) for bounds in cut]


# torch 2.13 gave both a new name, and warns of the old one
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def _gather(x: Tensor, group: Group) -> Tensor:
    return all_gather(x, group).transpose(0, 1).flatten(1, 2)


def _scatter(x: Tensor, group: Group) -> Tensor:
    by_rank = x.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1)  # [ranks, batch, seq/ranks, d_model]
    own = x.new_empty(by_rank.shape[1:])
    reduce_scatter_single(own, by_rank.flatten(0, 1).contiguous(), group=group)
    return own


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scatter(grad, ctx.group), None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_reduce_sum(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad.contiguous().clone(), ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group), None
