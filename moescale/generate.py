"""Read a trained model back on one process, and let it write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moescale.checkpoint.store import latest_checkpoint, load_checkpoint
from moescale.config import Config, ConfigError, load_config
from moescale.data.tokenizer import Tokenizer, load_tokenizer
from moescale.model.build import build_model
from moescale.model.language_model import LanguageModel


def load_model(path: Path) -> tuple[LanguageModel, Config, Path]:
    """Load weights without optimizer state. path: a checkpoint or a run directory.

    -> the model, the run's configuration, and the checkpoint that was read
    """
    if not path.exists():
        raise ConfigError(f"no such checkpoint: {path}")
    checkpoint = path if (path / "checkpoint.json").exists() else latest_checkpoint(path)
    if checkpoint is None:
        raise ConfigError(f"{path} holds no checkpoint: give a run directory or RUN/checkpoints/step_...")
    config = load_config(checkpoint / "config.yaml")
    model = build_model(config)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    for buffer in model.buffers():
        buffer.zero_()  # counts, which no checkpoint holds
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    load_checkpoint(checkpoint, tensors, prefix="model.")
    return model.eval(), config, checkpoint


def generate_text(
    path: Path, prompt: str, num_tokens: int, *, temperature: float, top_k: int | None, seed: int
) -> Iterator[str]:
    """Go on from a prompt, a document's first words. -> text, the prompt first, then piece by piece

    temperature: 0 takes the likeliest token. top_k: draw among that many; None = all.
    """
    model, config, checkpoint = load_model(path)
    own = checkpoint / "tokenizer.json"  # the checkpoint's copy, so that it can be moved
    tokenizer = load_tokenizer(str(own) if own.exists() else config.data.tokenizer)
    start = [tokenizer.boundary, *tokenizer.encode_batch([prompt])[0].tolist()]
    yield prompt
    drawn: list[int] = []
    written = 0
    for token in _draw(model, start, config.data.seq_len, tokenizer, temperature, top_k, seed):
        drawn.append(token)
        text = tokenizer.decode(drawn)
        last = len(drawn) == num_tokens
        if last or not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character waits for its other bytes
            yield text[written:]
            written = len(text)
        if last:
            return


@torch.no_grad()
def _draw(
    model: LanguageModel, start: list[int], context: int, tokenizer: Tokenizer,
    temperature: float, top_k: int | None, seed: int,
) -> Iterator[int]:
    """Draw tokens one after another, looking back on `context` of them; never the end of the document."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([start], device=device)
    while True:
        logits = model.logits(tokens[:, -context:])[0, -1, : tokenizer.vocab_size]
        logits[tokenizer.boundary] = float("-inf")
        if top_k is not None:
            logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = float("-inf")
        if temperature == 0:
            token = logits.argmax(keepdim=True)
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat((tokens, token.view(1, 1)), 1)
        yield int(token)
