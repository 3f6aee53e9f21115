"""Give every parameter its first values: a pure function of the seed and the parameter's name, in any layout."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill this rank's part of every parameter, never holding more than one whole matrix beside the model.

    A tensor of three dims is drawn matrix by matrix, so that a rank draws the experts that it holds and no others.
    """
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            fill = module.initial[name]
            full_name = f"{module_name}.{name}"
            local, first, cut = _place(parameter)
            matrices = local.unbind() if local.ndim == 3 else [local]
            for index, matrix in enumerate(matrices):
                whole = torch.empty(parameter.shape[-2:], dtype=local.dtype, device=local.device)
                fill(whole, _generator(seed, f"{full_name}/{first + index}", local.device))
                matrix.copy_(whole[cut])


def _place(parameter: nn.Parameter) -> tuple[torch.Tensor, int, tuple[slice, ...]]:
    """Say which part of the parameter lies here. -> local values; its first matrix (3 dims); the cut of the others"""
    if not isinstance(parameter.data, DTensor):
        return parameter.data, 0, (slice(None),)
    data = parameter.data
    cut = [(0, size) for size in data.shape]
    for axis, placement in enumerate(data.placements):
        if isinstance(placement, Shard):
            start, stop = cut[placement.dim]
            rank, chunk = data.device_mesh.get_local_rank(axis), -(-(stop - start) // data.device_mesh.size(axis))
            cut[placement.dim] = (min(start + rank * chunk, stop), min(start + (rank + 1) * chunk, stop))
    local = data.to_local()
    assert [stop - start for start, stop in cut] == list(local.shape), "a dim is cut in a way not known here"
    first = cut[0][0] if data.ndim == 3 else 0
    return local, first, tuple(slice(*bounds) for bounds in cut[-2:])


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
