"""A decoder-only language model: embed, blocks, norm, head, loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moescale.comm.collectives import local_tensor
from moescale.comm.placement import Placement, Share
from moescale.comm.sequence_shards import SequenceShards
from moescale.layers.linear import Embedding, Linear
from moescale.layers.positions import sinusoids
from moescale.mixers.base import Mixer, State
from moescale.model import generation
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
        sinusoidal: bool = False,
    ) -> None:
        """sinusoidal: whether the embedding of each token is added to one of its position."""
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleDict({str(index): block for index, block in blocks.items()})
        self.norm = norm
        self.head = head
        self.first, self.logit_scale, self.compute_dtype = first, logit_scale, compute_dtype
        self.sinusoidal = sinusoidal
        self.sequence, self.vocabulary = SequenceShards(), Share()

    def attach(self, placement: Placement) -> None:
        self.sequence, self.vocabulary = placement.sequence, placement.tp

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
        share = self.vocabulary
        loss, z = self._head(x, lambda x, weight: head_losses(
            x.flatten(0, 1), weight, wanted, logit_scale=self.logit_scale, group=share.group,
            first_token=share.first(share.size * len(weight))))
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
            router.set_dropless(True)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        try:
            x, _ = self._features(tokens, None, positions, positions)
            return self._scores(x)
        finally:  # a router left so would train without its capacity
            for router in routers:
                router.set_dropless(False)
            self.train(training)

    def generate(
        self, prompts: Iterable[Iterable[int]], num_tokens: int, *, samples: int = 1, temperature: float = 1.0,
        top_k: int | None = None, top_p: float | None = None, seed: int = 0, stops: Collection[int] = (),
        num_ids: int | None = None, context: int | None = None,
    ) -> list[list[list[int]]]:
        """Write on from prompts, on one process, as a batch in which no text depends on another.

        prompts: ids of each, the token that begins documents first. num_tokens: how many to write, at most. samples: of
        each prompt. temperature: what scores are divided by; 0 takes the likeliest token. top_k: draw among that many
        only. top_p: draw among the likeliest that together have this probability. seed: the same one draws the same
        tokens. stops: tokens that end a text. num_ids: tokens from this one on are never drawn. context: how far a text
        looks back, at most; None = to its first token. Raises ConfigError.
        Returns the new ids, by prompt and sample, without the stop.
        """
        sampling = generation.Sampling(temperature, top_k, top_p, seed)
        known = [list(map(int, prompt)) for prompt in prompts]
        written: list[list[int]] = [[] for _ in range(len(known) * samples)]
        for step in generation.next_tokens(self, known, num_tokens, sampling=sampling, samples=samples, stops=stops,
                                           num_ids=num_ids, context=context):
            for ids, token in zip(written, step, strict=True):
                if token is not None and token not in stops:
                    ids.append(token)
        return [written[first : first + samples] for first in range(0, len(written), samples)]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def new_states(self, batch: int, length: int) -> list[State]:
        """Make the state of each block's mixer, as its `new_state` does."""
        return [mixer.new_state(batch, length) for mixer in self.modules() if isinstance(mixer, Mixer)]

    def next_scores(self, tokens: Tensor, positions: Tensor, token_id: Tensor, states: list[State]) -> Tensor:
        """Score what follows the last of these tokens, which the states then hold, too.

        tokens, positions, token_id: [batch, seq] int64, as in a Batch. Returns [batch, vocab], at least float32.
        """
        x, _ = self._features(tokens, None, positions, token_id, states)
        return self._scores(x[:, -1:])[:, 0]

    def _scores(self, x: Tensor) -> Tensor:
        """x: [batch, seq, d_model]. Returns [batch, seq, vocab], at least float32."""
        scores = self._head(x, lambda x, weight: linear(x, weight.to(x.dtype)))
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(self.logit_scale)

    def _features(
        self, x: Tensor, router_losses: Tensor | None, positions: Tensor, token_id: Tensor,
        states: list[State] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            assert self.embedding is not None
            x = self.sequence.scatter(self.embedding(self.sequence.part(x), self.compute_dtype))
            if self.sinusoidal:
                x = x + sinusoids(self.sequence.own(positions), x.shape[-1]).to(x.dtype)
        if router_losses is None:
            router_losses = x.new_zeros(2, dtype=torch.promote_types(x.dtype, torch.float32))
        for index, block in enumerate(self.blocks.values()):
            x, losses = block(x, positions, token_id, None if states is None else states[index])
            router_losses = router_losses + losses
        return x, router_losses

    def _head(self, x: Tensor, score: Callable[[Tensor, Tensor], T]) -> T:
        """Let `score` have the normed features [batch, seq/cp, d_model] and the head's weight [vocab/tp, d_model]."""
        assert self.norm is not None
        x = self.sequence.gather(self.norm(x))
        if self.head is not None:
            return score(x, local_tensor(self.head.weight))
        assert self.embedding is not None
        return self.embedding.as_head(x, score)
