"""One block: a mixer and a channel mixer, each beside a residual."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """Mix tokens, then features; with channel_norm None both side by side on one norm (PaLM, sec. 2)."""

    def __init__(
        self, mixer_norm: nn.Module, mixer: nn.Module, channel_norm: nn.Module | None, channel_mixer: nn.Module
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = mixer_norm, mixer
        self.channel_norm, self.channel_mixer = channel_norm, channel_mixer

    def forward(self, x: Tensor, positions: Tensor, serial: Tensor) -> tuple[Tensor, Tensor]:
        """x: [batch, seq, d_model]. positions, serial: [batch, seq] int64. -> like x; [2] the router's two losses"""
        h = self.mixer_norm(x)
        if self.channel_norm is None:
            y, losses = self.channel_mixer(h, serial)
            return x + self.mixer(h, positions) + y, losses
        x = x + self.mixer(h, positions)
        y, losses = self.channel_mixer(self.channel_norm(x), serial)
        return x + y, losses
