"""What a tensor's device can run."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None


def triton_runs(x: Tensor) -> bool:
    """Say whether Triton kernels take such tensors: on a GPU, with the package there, and not in float64."""
    return TRITON and x.device.type == "cuda" and x.dtype != torch.float64
