"""A decoder-only language model: embed, blocks, norm, head, loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from moescale.layers.linear import Embedding, Linear
from moescale.layers.loss import cross_entropy, output_z_loss
from moescale.moe.routers import Router
from moescale.ops.sequence import Sequence


class LossSums(NamedTuple):
    """Sums over this micro-batch, each a scalar; the caller divides by the global counts.

    cross_entropy, output_z: over this rank's part of the sequences, where targets are not ignored.
    load_balance, router_z: over this rank's own valid tokens, added up over the MoE layers.
    """

    cross_entropy: Tensor
    output_z: Tensor
    load_balance: Tensor
    router_z: Tensor


class LanguageModel(nn.Module):
    """Predict each next token. With head None the embedding serves as head too.

    A piece of a model, as pipelines cut it, has some of the blocks, by their number in the whole; the first piece
    embeds, the last one has the norm, the head and the losses.
    """

    def __init__(
        self,
        embedding: Embedding | None,
        blocks: Mapping[int, nn.Module],
        norm: nn.Module | None,
        head: Linear | None,
        *,
        first: bool = True,
        logit_scale: float,
        output_z: bool,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleDict({str(index): block for index, block in blocks.items()})
        self.norm = norm
        self.head = head
        self.first, self.logit_scale, self.output_z, self.compute_dtype = first, logit_scale, output_z, compute_dtype
        self.sequence = Sequence()
        self.sum_losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self._sum_losses

    def forward(
        self, x: Tensor, router_losses: Tensor | None = None, *, targets: Tensor, positions: Tensor, serial: Tensor
    ) -> tuple[Tensor, ...]:
        """Run this piece. targets, positions, serial: [batch, seq] int64, as in a Batch, whole sequences.

        x: tokens, [batch, seq] int64, for the first piece; then what the piece before gave, with router_losses [2].
        -> LossSums' fields from the last piece; x [batch, seq/cp/tp, d_model] and router_losses [2] from others
        """
        x, router_losses = self._features(x, router_losses, positions, serial)
        if self.norm is None:
            return x, router_losses
        logits = self._logits(x).flatten(0, 1)  # [tokens, vocab/tp]
        loss, z = self.sum_losses(logits, self.sequence.part(targets).flatten())
        load_balance, router_z = (loss.clone() for loss in router_losses.unbind())  # FSDP hangs hooks on them: no views
        return loss, z, load_balance, router_z

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Score what follows each token, every row one document, on one process.

        tokens: [batch, seq] int64. -> [batch, seq, vocab] float32
        Nothing is dropped and nothing is random, whether the model is in training mode or not.
        """
        training, routers = self.training, [module for module in self.modules() if isinstance(module, Router)]
        self.eval()
        for router in routers:
            router.dropless = True
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        try:
            return self._logits(self._features(tokens, None, positions, positions)[0])
        finally:  # a router left so would train without its capacity
            for router in routers:
                router.dropless = False
            self.train(training)

    def _features(
        self, x: Tensor, router_losses: Tensor | None, positions: Tensor, serial: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            assert self.embedding is not None
            x = self.sequence.narrow(self.embedding(self.sequence.part(x), self.compute_dtype))
        if router_losses is None:
            router_losses = x.new_zeros(2, dtype=torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks.values():
            x, losses = block(x, positions, serial)
            router_losses = router_losses + losses
        return x, router_losses

    def _logits(self, x: Tensor) -> Tensor:
        """[batch, seq/cp/tp, d_model] -> [batch, seq/cp, vocab/tp] in at least float32"""
        assert self.norm is not None
        x = self.sequence.widen(self.norm(x))
        head = self.head if self.head is not None else cast(Embedding, self.embedding).logits
        logits = head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.logit_scale == 1 else logits * self.logit_scale

    def _sum_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """-> cross entropy and z-loss, summed over targets that are not ignored"""
        z = output_z_loss(logits, targets) if self.output_z else logits.new_zeros(())
        return cross_entropy(logits, targets), z
