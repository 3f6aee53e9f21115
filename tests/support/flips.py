"""Single bits that flip, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moescale.comm.collectives import local_tensor


def flip(tensor: Tensor, element: int, bit: int) -> None:
    """Flip one bit of a float32 tensor in place."""
    local_tensor(tensor).detach().view(-1).view(torch.int32)[element] ^= 1 << bit


@contextmanager
def flipped_once(module: torch.nn.Module, where: str) -> Iterator[None]:
    """Flip a bit of what a module puts out, or of its gradient, the first time."""
    left = [True]

    def spoil(tensor: Tensor) -> Tensor:
        if not left:
            return tensor
        left.clear()
        tensor = tensor.clone()
        flip(tensor, 5, 18)
        return tensor

    def forward(_: torch.nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, losses = output
        if where == "activation":
            x = spoil(x)
        else:
            x.register_hook(spoil)
        return x, losses

    hook = module.register_forward_hook(forward, prepend=True)
    yield
    hook.remove()
