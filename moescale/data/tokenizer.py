"""Turn text into token ids: plain bytes, or a Hugging Face tokenizer.json.

A document is stored as its boundary token followed by its text, so the last token of a document learns to predict the
boundary of the next, and generation starts from a boundary alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moescale.config import ConfigError

# The first of these that a tokenizer knows is its boundary; ends of text before starts, whole texts before sentences.
BOUNDARY_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]", "[SEP]",  # noqa: RUF001
                  "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "[CLS]")


class Tokenizer(Protocol):
    """name: as in the configuration. boundary: the id before every document. fingerprint: changes with the ids."""

    name: str
    vocab_size: int
    boundary: int
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts one by one, without boundaries. -> for each text its ids, [tokens] of an integer type"""

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids back into text, dropping boundaries; what is not text becomes the replacement character."""


class ByteTokenizer:
    """Every UTF-8 byte is its own id; the boundary is the one id after them."""

    name = "bytes"
    boundary = 256
    vocab_size = 257
    fingerprint = "bytes-1"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(index for index in map(int, ids) if index < self.boundary).decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json through the `tokenizers` library; whatever stands in a text is text, never a special token."""

    def __init__(self, name: str, content: bytes) -> None:
        from tokenizers import Tokenizer as Backend

        self.name = name
        self.fingerprint = "tokenizer.json-1-" + hashlib.sha256(content).hexdigest()
        self._backend: Any = Backend.from_str(content.decode())
        self._backend.no_truncation()  # a file may carry the settings of the model it was made for
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # or a document that mentions the boundary would contain it
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        known = (self._backend.token_to_id(token) for token in BOUNDARY_NAMES)
        boundary = next((index for index in known if index is not None), None)
        if boundary is None:
            raise ConfigError(f"data.tokenizer={name} has no token that can stand between documents: "
                              f"add one of {' '.join(BOUNDARY_NAMES)}")
        self.boundary: int = boundary

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [index for index in map(int, ids) if index != self.boundary]
        return str(self._backend.decode(kept, skip_special_tokens=False))


def load_tokenizer(spec: str) -> Tokenizer:
    """Load the tokenizer that the configuration names: `bytes`, or the path of a tokenizer.json.

    Raises ConfigError when the file is missing or is no tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    advice = "write bytes, or the path of a Hugging Face tokenizer.json"
    if path.is_dir():
        raise ConfigError(f"data.tokenizer={spec} is a directory: write {path / 'tokenizer.json'}")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"data.tokenizer={spec}: no such file: {advice}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.tokenizer={spec} cannot be read ({error}): {advice}") from None
    try:
        return HuggingFaceTokenizer(spec, content)
    except ConfigError:
        raise
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())
        raise ConfigError(f"data.tokenizer={spec} is not a Hugging Face tokenizer.json ({reason:.100}): "
                          f"{advice}") from None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a model whose vocabulary is smaller than the tokenizer's.

    vocab_size: the model's. Raises ConfigError with the size to write.
    """
    needed = tokenizer.vocab_size
    if needed > vocab_size:
        raise ConfigError(f"data.tokenizer={tokenizer.name} has {needed} ids but model.vocab_size={vocab_size}: write "
                          f"model.vocab_size={needed} or more (a multiple of 8, e.g. {-(-needed // 8) * 8})")
