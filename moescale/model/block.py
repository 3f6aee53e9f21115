"""One block: a mixer and a channel mixer, each beside a residual."""

from __future__ import annotations

from torch import Tensor, nn

from moescale.comm.sequence_shards import Sequence
from moescale.layers.feed_forward import FeedForward
from moescale.mixers.base import State


class Block(nn.Module):
    """Mix tokens, then features; with channel_norm None both side by side on one norm (PaLM, sec. 2).

    Mixers and dense feed-forwards work on the part of the sequence that the ranks of `tp` share, each with its cut of
    the matrices; a mixture of experts works on the own positions.
    """

    def __init__(
        self, mixer_norm: nn.Module, mixer: nn.Module, channel_norm: nn.Module | None, channel_mixer: nn.Module
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = mixer_norm, mixer
        self.channel_norm, self.channel_mixer = channel_norm, channel_mixer
        self.sequence = Sequence()

    def forward(
        self, x: Tensor, positions: Tensor, token_id: Tensor, state: State | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: [batch, seq/cp/tp, d_model]. positions, token_id: [batch, seq] int64. state: of the mixer.

        -> like x; [2] the router's two losses
        """
        widen, narrow = self.sequence.widen, self.sequence.narrow
        dense = isinstance(self.channel_mixer, FeedForward)
        h = self.mixer_norm(x)
        wide = widen(h)  # [batch, seq/cp, d_model]
        mixed = self.mixer(wide, positions, state)
        if self.channel_norm is None:
            y, losses = self.channel_mixer(wide if dense else h, token_id)
            return x + (narrow(mixed + y) if dense else narrow(mixed) + y), losses
        x = x + narrow(mixed)
        h = self.channel_norm(x)
        y, losses = self.channel_mixer(widen(h) if dense else h, token_id)
        return x + (narrow(y) if dense else y), losses
