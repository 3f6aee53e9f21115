"""Read a trained model back on one process, and let it write text."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moescale.checkpoint.store import load_checkpoint, read_last, read_state
from moescale.config import Config, ConfigError, load_config
from moescale.convert.formats.native import check_model
from moescale.data.tokenizer import TextStream, Tokenizer, tokenizer_of_checkpoint
from moescale.model.build import build_model
from moescale.model.generation import Sampling, next_tokens
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
    path: Path, prompts: Sequence[str], num_tokens: int, *, samples: int, sampling: Sampling, special: bool = False,
    context: int | None = None,
) -> Iterator[str]:
    """Go on from prompts, each a document's first words, up to the end of the document or num_tokens.

    samples: of each prompt. special: the names of special tokens in a prompt stand for the tokens. context: how far a
    text looks back, at most; None = as `usual_context` says. Raises ConfigError.
    Returns what to print, piece by piece: the one text as it grows, or several, each below a line with its number.
    """
    trained = load_trained(path)
    config, tokenizer = trained.config, trained.tokenizer
    starts = [_start(tokenizer, prompt, special, config.model.vocab_size) for prompt in prompts]
    names = sorted({name for prompt in prompts for name in tokenizer.special_tokens(prompt)})
    if names and not special:
        print(f"moescale: {', '.join(names)} in the prompt is taken as letters; --special takes it as the token",
              file=sys.stderr)
    steps = next_tokens(trained.model, starts, num_tokens, sampling=sampling, samples=samples, stops=tokenizer.stops,
                        num_ids=tokenizer.num_ids, context=context or usual_context(config))
    if len(prompts) * samples == 1:
        yield from _grow(prompts[0], tokenizer.stream(before=starts[0]), tokenizer, (step[0] for step in steps))
        return
    for index, tokens in enumerate(zip(*steps, strict=True)):
        number, sample = divmod(index, samples)
        text = "".join(_grow(prompts[number], tokenizer.stream(before=starts[number]), tokenizer, tokens))
        newline = "\n" if index else ""
        yield f"{newline}--- prompt {number + 1}, sample {sample + 1}\n{text}"


def _grow(prompt: str, stream: TextStream, tokenizer: Tokenizer, tokens: Iterable[int | None]) -> Iterator[str]:
    """Return a text piece by piece. tokens: after the prompt, None when it has ended"""
    yield prompt
    for token in tokens:
        if token is not None and token not in tokenizer.stops:
            yield stream.push(token)
    yield stream.rest()


def usual_context(config: Config) -> int | None:
    """Say how far a model looks back when it generates: as far as in training, unless all its mixers can do more.

    None = without a bound.
    """
    seq_len = config.data.seq_len
    return None if all(layer.mixer.holds_beyond(seq_len) for layer in config.layers) else seq_len


def _start(tokenizer: Tokenizer, prompt: str, special: bool, num_rows: int) -> list[int]:
    """Encode a prompt as the beginning of a document. -> token ids"""
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
