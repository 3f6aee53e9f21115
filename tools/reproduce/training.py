"""Trains small models for reproductions: language models with the engine of real runs, other nets with a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moescale.config import parse_config
from moescale.data.batches import Batch
from moescale.data.corpus import open_corpus
from moescale.engine.native import NativeEngine
from moescale.parallel.mesh import start_mesh

TEXT_BYTES = 3_000_000
TRAINED = 0.9  # the share of the text that is trained on; the rest is held out
BYTES_VOCAB = 264  # 256 bytes, the token that begins documents, and a few to a round number


@cache
def library_text(size: int = TEXT_BYTES) -> Tensor:
    """Read the first bytes of the default corpus, the running Python's library source. Returns [size] int64."""
    text = bytearray()
    for document in open_corpus(()).documents():
        text += document.text.encode()
        if len(text) >= size:
            break
    return torch.from_numpy(np.frombuffer(bytes(text[:size]), dtype=np.uint8).astype(np.int64))


def text_batches(seed: int, batch: int, length: int, *, held_out: bool = False) -> Iterator[Tensor]:
    """Draw windows of the text without end, of the part that is trained on or of the rest.

    Yields [batch, length + 1] int64.
    """
    text, generator = library_text(), torch.Generator().manual_seed(seed)
    cut = int(TRAINED * len(text))
    low, high = (cut, len(text) - length) if held_out else (0, cut - length)
    while True:
        starts = torch.randint(low, high, (batch, 1), generator=generator)
        yield text[starts + torch.arange(length + 1)]


def as_batch(tokens: Tensor, *, first_id: int = 0, row_documents: int = 1) -> Batch:
    """Make a batch in which every row of tokens is a document.

    tokens: [documents, length + 1] int64. first_id: the token id of the first. row_documents: how many documents share
    a row of the batch, which is a routing group.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    token_id = first_id + torch.arange(inputs.numel())
    rows = (len(tokens) // row_documents, -1)
    return Batch(*(part.reshape(rows).contiguous() for part in (inputs, targets, positions, token_id)))


class Trainer:
    """A small language model on one process.

    keys: a run's configuration. Unless they say otherwise: float32, Adam at a constant rate without decay or clipping.
    row_documents: as in `as_batch`.
    """

    def __init__(self, keys: dict[str, Any], seed: int, *, row_documents: int = 1) -> None:
        model = {"vocab_size": BYTES_VOCAB, "init": "fan_in", **keys.get("model", {})}
        optim = {"betas": [0.9, 0.999], "schedule": "constant", "weight_decay": 0.0, "clip_norm": None,
                 **keys.get("optim", {})}
        run = {"seed": seed, **keys.get("run", {})}
        self.config = parse_config({**keys, "model": model, "optim": optim, "run": run}, "reproduction").for_world(1)
        self.engine = NativeEngine(self.config, start_mesh(self.config))
        self.row_documents, self.tokens_seen = row_documents, 0

    def train(self, tokens: Tensor) -> float:
        """Take a step on [documents, length + 1] int64. Returns its cross entropy, in nats per token."""
        batch = as_batch(tokens, first_id=self.tokens_seen, row_documents=self.row_documents)
        loss = self.engine.forward_backward([batch]).cross_entropy
        self.engine.step()
        self.tokens_seen += batch.tokens.numel()
        return float(loss)

    def evaluate(self, batches: Iterable[Tensor]) -> float:
        """Compute the mean cross entropy of batches of [documents, length + 1] int64, in nats per token."""
        return self.engine.evaluate([as_batch(tokens, row_documents=self.row_documents) for tokens in batches])


def train(
    trainer: Trainer, batches: Iterator[Tensor], steps: int, watch: Callable[[Trainer], None] | None = None
) -> list[float]:
    """Take steps, calling `watch` after each. Returns the loss of each."""
    losses = []
    for tokens in islice(batches, steps):
        losses.append(trainer.train(tokens))
        if watch is not None:
            watch(trainer)
    return losses


def fit(
    optimizer: torch.optim.Optimizer, losses: Iterable[Tensor], *, rate: Callable[[int], float] | None = None,
    clip_norm: float | None = None,
) -> list[float]:
    """Train any net with an optimizer of its parameters.

    losses: yields the loss of each next batch, a scalar, and ends where training does. rate: of a step, counted from 0;
    None = the optimizer's. clip_norm: of the gradients of all parameters. Returns each step's loss.
    """
    values, learned = list[float](), [each for group in optimizer.param_groups for each in group["params"]]
    for loss in losses:
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(len(values))
        optimizer.zero_grad()
        loss.backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(learned, clip_norm)
        optimizer.step()
        values.append(float(loss.detach()))
    return values


def smooth(values: Sequence[float], width: int = 20) -> list[float]:
    """Average each value with those before it, `width` of them or as many as there are."""
    sums = np.cumsum([0.0, *values])
    return [float(sums[end] - sums[max(0, end - width)]) / min(width, end) for end in range(1, len(values) + 1)]


def steps_to(curve: Sequence[float], goal: float) -> int:
    """Count the steps until a curve has come down to a loss; all of them if it never does."""
    return next((index + 1 for index, loss in enumerate(curve) if loss <= goal), len(curve))
