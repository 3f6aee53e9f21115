"""Read a trained model back on one process, and let it write."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moescale.checkpoint.store import load_checkpoint, read_last, read_state
from moescale.config import Config, ConfigError, load_config
from moescale.convert.formats.native import check_model
from moescale.data.tokenizer import Tokenizer, tokenizer_of_checkpoint
from moescale.model.build import build_model
from moescale.model.language_model import LanguageModel


@dataclass(frozen=True)
class Trained:
    """A model read back, with all that belongs to it. state: the small values of its checkpoint."""

    model: LanguageModel
    config: Config
    checkpoint: Path
    state: dict[str, Any]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_of_checkpoint(self.config.data, self.checkpoint, self.state["step"])


def load_trained(path: Path, overrides: Sequence[str] = (), *, tokenizer: bool = True) -> Trained:
    """Load weights without optimizer state. path: a checkpoint or a run directory. overrides: of its configuration.

    tokenizer: the model's own is needed too. Raises ConfigError.
    """

    def load(checkpoint: Path) -> Trained:
        config = load_config(checkpoint / "config.yaml", overrides, whole=True)
        check_model(checkpoint, config)
        model = build_model(config)
        model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
        for buffer in model.buffers():
            buffer.zero_()  # counts, which no checkpoint holds
        tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        load_checkpoint(checkpoint, tensors, prefix="model.")
        trained = Trained(model.eval(), config, checkpoint, read_state(checkpoint))
        if tokenizer:
            trained.tokenizer  # noqa: B018 - read while the checkpoint is held
        return trained

    return read_last(path, load)


def load_model(path: Path) -> tuple[LanguageModel, Config, Path]:
    """Load weights alone. path: a checkpoint or a run directory.

    -> the model, the run's configuration, and the checkpoint that was read
    """
    trained = load_trained(path, tokenizer=False)
    return trained.model, trained.config, trained.checkpoint


def generate_text(
    path: Path, prompt: str, num_tokens: int, *, temperature: float, top_k: int | None, seed: int, special: bool = False
) -> Iterator[str]:
    """Go on from a prompt, a document's first words, up to the end of the document or num_tokens.

    temperature: 0 takes the likeliest token. top_k: draw among that many; None = all. special: the names of special
    tokens in the prompt stand for the tokens. Raises ConfigError. -> text, the prompt first, then piece by piece
    """
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"--temperature={temperature}: write a number from 0 up, e.g. 0.8")
    trained = load_trained(path)
    config, tokenizer = trained.config, trained.tokenizer
    start = _start(tokenizer, prompt, special, config.model.vocab_size)
    names = [] if special else tokenizer.special_tokens(prompt)
    if names:
        print(f"moescale: {', '.join(names)} in the prompt is taken as letters; --special takes it as the token",
              file=sys.stderr)
    yield prompt
    stream = tokenizer.stream(before=start)
    tokens = _draw(trained.model, start, config.data.seq_len, tokenizer, temperature, top_k, seed)
    for token in islice(tokens, num_tokens):
        if token in tokenizer.stops:
            break
        yield stream.push(token)
    yield stream.rest()


def _start(tokenizer: Tokenizer, prompt: str, special: bool, num_rows: int) -> list[int]:
    """-> the ids that a document with this prompt begins with"""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--prompt is not UTF-8 text from its character {error.start + 1} on: "
                          "write it in UTF-8") from None
    ids: list[int] = (tokenizer.encode_special(prompt) if special else tokenizer.encode_batch([prompt])[0]).tolist()
    if max(ids, default=0) >= num_rows:
        names = ", ".join(tokenizer.special_tokens(prompt))
        raise ConfigError(f"--prompt: the model has {num_rows} rows and none for some of {names}: leave those out")
    return ids if special and ids[:1] == [tokenizer.begin] else [tokenizer.begin, *ids]


@torch.no_grad()
def _draw(
    model: LanguageModel, start: list[int], context: int, tokenizer: Tokenizer,
    temperature: float, top_k: int | None, seed: int,
) -> Iterator[int]:
    """Draw tokens one after another, looking back on `context` of them, without an end."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([start], device=device)
    while True:
        logits = model.logits(tokens[:, -context:])[0, -1, : tokenizer.num_ids].double()
        if not logits.isfinite().all():
            raise ConfigError("the model's scores are not finite numbers: take an earlier checkpoint")
        if top_k is not None:
            logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = float("-inf")
        if temperature == 0:
            token = logits.argmax(keepdim=True)
        else:
            odds = ((logits - logits.max()) / temperature).softmax(-1)  # the best is 0, however small the temperature
            token = torch.multinomial(odds, 1, generator=generator)
        tokens = torch.cat((tokens, token.view(1, 1)), 1)
        yield int(token)
