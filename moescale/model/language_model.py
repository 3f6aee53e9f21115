"""A decoder-only language model: embed, blocks, norm, head, loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moescale.layers.linear import Embedding, Linear
from moescale.layers.loss import cross_entropy, output_z_loss


class LossSums(NamedTuple):
    """Sums over this micro-batch, each a scalar float32; the caller divides by the global counts.

    cross_entropy, output_z: over targets that are not ignored.
    load_balance, router_z: over valid tokens, added up over the MoE layers.
    """

    cross_entropy: Tensor
    output_z: Tensor
    load_balance: Tensor
    router_z: Tensor


class LanguageModel(nn.Module):
    """Predict each next token. With head None the embedding serves as head too."""

    def __init__(
        self,
        embedding: Embedding,
        blocks: Iterable[nn.Module],
        norm: nn.Module,
        head: Linear | None,
        *,
        logit_scale: float,
        output_z: bool,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = head
        self.logit_scale, self.output_z, self.compute_dtype = logit_scale, output_z, compute_dtype

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor, serial: Tensor) -> LossSums:
        """tokens, targets, positions, serial: [batch, seq] int64, as in a Batch. -> the sums of the losses"""
        logits, router_losses = self._logits(tokens, positions, serial)
        logits, targets = logits.flatten(0, 1), targets.flatten()
        z = output_z_loss(logits, targets) if self.output_z else logits.new_zeros(())
        load_balance, router_z = (loss.clone() for loss in router_losses.unbind())  # FSDP hangs hooks on them: no views
        return LossSums(cross_entropy(logits, targets), z, load_balance, router_z)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Score what follows each token, every row one document.

        tokens: [batch, seq] int64. -> [batch, seq, vocab] float32
        Nothing is dropped and nothing is random, whether the model is in training mode or not.
        """
        training = self.training
        self.eval()
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits, _ = self._logits(tokens, positions, positions)
        self.train(training)
        return logits

    def _logits(self, tokens: Tensor, positions: Tensor, serial: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens, self.compute_dtype)  # [batch, seq, d_model]
        router_losses = torch.zeros(2, device=x.device)
        for block in self.blocks:
            x, losses = block(x, positions, serial)
            router_losses = router_losses + losses
        x = self.norm(x)
        logits = self.head(x) if self.head is not None else F.linear(x, self.embedding.weight.to(x.dtype))
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(wide)  # [batch, seq, vocab]
        return logits if self.logit_scale == 1 else logits * self.logit_scale, router_losses
