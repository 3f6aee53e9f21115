"""Norms over features: scale, no bias, statistics in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescale.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, then scale. weight: [d_model]"""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_model], any dtype. -> the same"""
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class LayerNorm(RMSNorm):
    """Take away the mean, divide by the standard deviation, scale; no bias (PaLM). weight: [d_model]"""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_model], any dtype. -> the same"""
        upcast = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = self.weight.to(x.dtype).to(upcast.dtype)
        return F.layer_norm(upcast, scale.shape, scale, None, self.eps).to(x.dtype)


class NoNorm(nn.Module):
    """Leaves features as they are, and has no weight."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_model], any dtype. -> the same"""
        return x


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm, "none": NoNorm}
