"""Give every parameter its first values: a pure function of the seed and the parameter's name, in any layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moescale.comm.collectives import local_part
from moescale.spec.model import ModelSpec
from moescale.spec.weights import Init


def initialize(model: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Fill this rank's part of every parameter, never holding more than one whole matrix beside the model.

    spec: says how each starts. Experts are drawn one by one, so that a rank draws those that it holds and no others.
    """
    initialize_each(model.named_parameters(), spec, seed)


@torch.no_grad()
def initialize_each(named: Iterable[tuple[str, nn.Parameter]], spec: ModelSpec, seed: int) -> None:
    """Do so with parameters that lie in no module of ours, by their names in the whole model."""
    described = {".".join(weight.name): weight for weight in spec.weights()}
    for name, parameter in named:
        weight = described[name]
        local, cut = local_part(parameter.data)
        shape, first = weight.shape, 0
        matrices: tuple[Tensor, ...] = (local,)
        if weight.view == "sparse":
            (experts, *cut), shape = cut, shape[1:]
            first, matrices = experts.start, local.unbind()
        for index, matrix in enumerate(matrices):
            whole = torch.empty(shape, dtype=local.dtype, device=local.device)
            _fill(whole, weight.init, _generator(seed, f"{name}/{first + index}", local.device))
            if weight.init.by_depth:
                whole /= math.sqrt(len(spec.layers))
            matrix.copy_(whole[tuple(cut)])


def _fill(tensor: Tensor, init: Init, generator: torch.Generator) -> None:
    if init.kind == "normal":
        tensor.normal_(0, init.std, generator=generator)
    elif init.kind == "truncated_normal":
        nn.init.trunc_normal_(tensor, 0, init.std, -2 * init.std, 2 * init.std, generator=generator)
    elif init.kind == "uniform":
        tensor.uniform_(init.low, init.high, generator=generator)
        if init.of == "exp":
            tensor.log_()
        elif init.of == "log_softplus":
            softplus = tensor.exp_()
            tensor.copy_(softplus + (-torch.expm1(-softplus)).log())
    elif init.kind == "table":
        from moescale.ops.s4 import first_values  # only models with S4 have need of it

        tensor.copy_(first_values(init.table, 2 * tensor.shape[1]))
    else:
        tensor.fill_({"zeros": 0, "ones": 1}[init.kind])


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
