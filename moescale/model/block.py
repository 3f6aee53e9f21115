"""One block: a mixer and a channel mixer, each beside a residual."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moescale.comm.placement import Placement
from moescale.comm.sequence_shards import SequenceShards
from moescale.layers.feed_forward import FeedForward
from moescale.layers.residual import ReZero
from moescale.mixers.base import State
from moescale.moe.layer import MoELayer
from moescale.moe.routing_statistics import Uncounted


class Block(nn.Module):
    """Mix tokens, then features; with channel_norm None both side by side on one norm (PaLM, sec. 2).

    With channel_mixer None tokens alone, with channel_norm None too (Mamba). residual: weighs what both add to the
    features; None adds it as it is.

    Mixers and dense feed-forwards work on the part of the sequence that the ranks of `tp` share, each with its cut of
    the matrices; a mixture of experts works on the own positions.
    """

    def __init__(
        self, mixer_norm: nn.Module, mixer: nn.Module, channel_norm: nn.Module | None,
        channel_mixer: nn.Module | None, residual: ReZero | None = None,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.mixer_norm, self.mixer = mixer_norm, mixer
        self.channel_norm, self.channel_mixer = channel_norm, channel_mixer
        self.sequence, self.recomputes = SequenceShards(), False

    def attach(self, placement: Placement) -> None:
        self.sequence, self.recomputes = placement.sequence, placement.recompute == "full"
        if placement.compiled:
            self.compile()

    def forward(
        self, x: Tensor, positions: Tensor, token_id: Tensor, state: State | None = None
    ) -> tuple[Tensor, Tensor]:
        """Apply both sublayers.

        x: [batch, seq/cp/tp, d_model]. positions, token_id: [batch, seq] int64. state: of the mixer.
        Returns features like x; [2] the router's two losses.
        """
        if not self.recomputes:
            return self._mix(x, positions, token_id, state)
        return checkpoint(self._mix, x, positions, token_id, state, use_reentrant=False, preserve_rng_state=False,
                          context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return what surrounds the first run, and those in backward."""
        counted = [self.channel_mixer.statistics] if isinstance(self.channel_mixer, MoELayer) else []
        return nullcontext(), Uncounted(counted)

    def _mix(self, x: Tensor, positions: Tensor, token_id: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
        gather, scatter = self.sequence.gather, self.sequence.scatter
        dense = isinstance(self.channel_mixer, FeedForward)
        alpha = None if self.residual is None else self.residual(x.dtype)

        def add(x: Tensor, y: Tensor) -> Tensor:
            return x + y if alpha is None else x + alpha * y

        h = self.mixer_norm(x)
        part = gather(h)  # [batch, seq/cp, d_model]
        mixed = self.mixer(part, positions, state)
        if self.channel_mixer is None:
            return add(x, scatter(mixed)), torch.zeros(2, device=x.device)
        if self.channel_norm is None:
            y, losses = self.channel_mixer(part if dense else h, token_id)
            return add(x, scatter(mixed + y) if dense else scatter(mixed) + y), losses
        x = add(x, scatter(mixed))
        h = self.channel_norm(x)
        y, losses = self.channel_mixer(gather(h) if dense else h, token_id)
        return add(x, scatter(y) if dense else y), losses
