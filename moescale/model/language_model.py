"""A decoder-only language model: embed, blocks, norm, head, loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moescale.comm.collectives import local_tensor
from moescale.comm.sequence_shards import Sequence
from moescale.layers.linear import Embedding, Linear
from moescale.moe.routers import Router
from moescale.ops.head_losses import head_losses
from moescale.ops.product import linear

T = TypeVar("T")


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
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleDict({str(index): block for index, block in blocks.items()})
        self.norm = norm
        self.head = head
        self.first, self.logit_scale, self.compute_dtype = first, logit_scale, compute_dtype
        self.sequence = Sequence()
        self.sum_losses: Callable[..., tuple[Tensor, Tensor]] = head_losses

    def forward(
        self, x: Tensor, router_losses: Tensor | None = None, *, targets: Tensor, positions: Tensor, token_id: Tensor
    ) -> tuple[Tensor, ...]:
        """Run this piece. targets, positions, token_id: [batch, seq] int64, as in a Batch, whole sequences.

        x: tokens, [batch, seq] int64, for the first piece; then what the piece before gave, with router_losses [2].
        -> LossSums' fields from the last piece; x [batch, seq/cp/tp, d_model] and router_losses [2] from others
        """
        x, router_losses = self._features(x, router_losses, positions, token_id)
        if self.norm is None:
            return x, router_losses
        wanted = self.sequence.part(targets).flatten()
        loss, z = self._head(x, lambda x, weight: self.sum_losses(
            x.flatten(0, 1), weight, wanted, logit_scale=self.logit_scale))
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
            x, _ = self._features(tokens, None, positions, positions)
            logits = self._head(x, lambda x, weight: linear(x, weight.to(x.dtype)))
            return logits.to(torch.promote_types(logits.dtype, torch.float32)).mul_(self.logit_scale)
        finally:  # a router left so would train without its capacity
            for router in routers:
                router.dropless = False
            self.train(training)

    def _features(
        self, x: Tensor, router_losses: Tensor | None, positions: Tensor, token_id: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            assert self.embedding is not None
            x = self.sequence.narrow(self.embedding(self.sequence.part(x), self.compute_dtype))
        if router_losses is None:
            router_losses = x.new_zeros(2, dtype=torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks.values():
            x, losses = block(x, positions, token_id)
            router_losses = router_losses + losses
        return x, router_losses

    def _head(self, x: Tensor, score: Callable[[Tensor, Tensor], T]) -> T:
        """Let `score` have the normed features [batch, seq/cp, d_model] and the head's weight [vocab/tp, d_model]."""
        assert self.norm is not None
        x = self.sequence.widen(self.norm(x))
        if self.head is not None:
            return score(x, local_tensor(self.head.weight))
        assert self.embedding is not None
        return self.embedding.as_head(x, score)
