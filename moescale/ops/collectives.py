"""Communication with the group as an argument, forward and backward. A group of None is one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Group = dist.ProcessGroup | None


def all_to_all(rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Send the first send[0] rows to rank 0 of the group, the next send[1] to rank 1, ...; receive likewise.

    rows: [sum(send), d_model]. send, receive: rows per rank of the group, zero allowed. -> [sum(receive), d_model]
    """
    return _AllToAll.apply(rows, send, receive, group)


def exchange_counts(counts: Tensor, group: Group) -> Tensor:
    """Tell each rank how many rows come to each of its experts.

    counts: [experts] int64, this rank's rows by global expert. -> [ranks, local_experts] int64, by source rank
    """
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received.view(dist.get_world_size(group), -1)


def all_reduce_sum(tensor: Tensor, group: Group) -> Tensor:
    """Add up over the ranks of the group, in place; outside autograd. -> the same tensor"""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Take this rank's part of a sharded tensor, with its gradient; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        returned = grad.new_empty(sum(ctx.send), grad.shape[1])
        dist.all_to_all_single(returned, grad.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return returned, None, None, None
