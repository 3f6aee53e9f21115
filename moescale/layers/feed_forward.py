"""Dense feed-forward layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moescale.comm.placement import Placement
from moescale.layers.linear import Linear
from moescale.ops import expert_feed_forward as ops
from moescale.spec.feed_forward import GATED

ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "gelu": "gelu", "relu": "relu"}  # the plain function within


class FeedForward(nn.Module):
    """Widen to d_ff, activate, narrow again: a dense channel mixer."""

    def __init__(self, d_model: int, d_ff: int, activation: str) -> None:
        super().__init__()
        self.activation = ops.ACTIVATIONS[ACTIVATIONS[activation]]
        self.gate = Linear(d_model, d_ff) if activation in GATED else None
        self.up = Linear(d_model, d_ff)
        self.down = Linear(d_ff, d_model)
        self.recomputes = False

    def attach(self, placement: Placement) -> None:
        self.recomputes = placement.recompute == "selective"

    def forward(self, x: Tensor, token_id: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the layer to each token.

        x: [batch, seq, d_model]. token_id: not used. Returns features like x; the two losses of a router, zeros.
        """
        if self.recomputes:
            y = checkpoint(self._apply_matrices, x, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self._apply_matrices(x)
        return y, torch.zeros(2, device=x.device)

    def _apply_matrices(self, x: Tensor) -> Tensor:
        hidden = self.up(x)  # [batch, seq, d_ff]
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x)) * hidden
        return self.down(hidden)
