"""Text <-> token ids: bytes, or any Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from moescale.config import ConfigError

BOUNDARIES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]", "<s>", "<bos>", "[CLS]")


class Tokenizer(Protocol):
    """vocab_size: ids are below it. boundary: the id that stands at the start of every document."""

    vocab_size: int
    boundary: int
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """-> for each text its ids, [tokens] int64, no boundary among them"""

    def decode(self, ids: Sequence[int]) -> str:
        """-> the text of the ids; boundaries say nothing, broken characters become U+FFFD"""


class ByteTokenizer:
    """The bytes of UTF-8 are the ids 0 to 255."""

    vocab_size = 257
    boundary = 256
    fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json; the boundary is its end-of-text token."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Rust

        try:
            text = path.read_text(encoding="utf-8")
            self._rust = Rust.from_str(text)
        except FileNotFoundError:
            raise ConfigError(f"data.tokenizer={path}: no such file; write bytes, or a tokenizer.json's path") from None
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"data.tokenizer={path} is not a tokenizer.json: {str(error)[:200]}") from None
        known = [self._rust.token_to_id(name) for name in BOUNDARIES]
        boundary = next((number for number in known if number is not None), None)
        if boundary is None:
            raise ConfigError(f"data.tokenizer={path} has no token that ends a text: add {' or '.join(BOUNDARIES[:3])}")
        self.boundary = boundary
        self.vocab_size = max(self._rust.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int64) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._rust.decode([i for i in ids if i != self.boundary], skip_special_tokens=False))


def load_tokenizer(spec: str) -> Tokenizer:
    """Make the tokenizer of `data.tokenizer`: "bytes", or a path. Raises ConfigError."""
    return ByteTokenizer() if spec == "bytes" else HuggingFaceTokenizer(Path(spec).expanduser())


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a model that has no row for some token."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"data.tokenizer has {tokenizer.vocab_size} ids but model.vocab_size={vocab_size}: write "
                          f"model.vocab_size={-(-tokenizer.vocab_size // 8) * 8} or more")
