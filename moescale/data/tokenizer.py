"""Turn text into token ids and back: plain bytes, or a Hugging Face tokenizer.json.

A document is stored as its beginning token, its text and its end token; where a model has one token for both, it stands
once, before the text, and the beginning of the next document ends this one. So the end of a document is always learnt,
and generation starts from the beginning token alone.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moescale.config import ConfigError, DataConfig
from moescale.files.reading import parse_json, read_bytes

# The first of these that a tokenizer knows ends its documents, and begins them, where none of the model's files says
# otherwise; ends of text come before starts, whole texts before sentences.
BOUNDARY_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]", "[SEP]",  # noqa: RUF001
                  "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "[CLS]")
SETTINGS_FILES = ("tokenizer_config.json", "generation_config.json", "config.json")  # beside a tokenizer.json
COMPANIONS = ("tokenizer.json", *SETTINGS_FILES, "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
              "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")  # what goes where it goes
MARK = "\N{REPLACEMENT CHARACTER}"
WINDOW_TOKENS, KEPT_TOKENS = 64, 8  # that a stream decodes at a time, and as context of those that come


class TextStream(Protocol):
    """Text that grows token by token; what is given out at each step adds up to the text of all of them."""

    def push(self, index: int) -> str:
        """Take a token. -> the text that is certain with it, empty where a character or run of bytes is not whole"""

    def rest(self) -> str:
        """Return the text that was held back so far."""


class Tokenizer(Protocol):
    """A vocabulary, and the tokens that begin and end a document.

    name: as in the configuration. vocab_size: rows that a model needs: every id that text, a beginning or an end can
    have is below. num_ids: every id that has a meaning is below, special tokens included. begin, end: ids, equal where
    one token does both. stops: ids after which generated text is over. fingerprint: changes with the ids of a text.
    files: what makes the tokenizer complete in itself, for other programs too, by name.
    """

    name: str
    vocab_size: int
    num_ids: int
    begin: int
    end: int
    stops: frozenset[int]
    fingerprint: str
    files: Mapping[str, bytes]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts one by one, without beginning or end; whatever stands in them is text, never a special token.

        -> for each text its ids, [tokens] of an integer type
        """

    def encode_special(self, text: str) -> np.ndarray:
        """Encode a text in which special tokens are written out, each as its id. -> [tokens]"""

    def encode_published(self, text: str) -> np.ndarray:
        """Encode a text as other programs do: the same, with the tokens that the tokenizer itself puts around it."""

    def special_tokens(self, text: str) -> list[str]:
        """Find the special tokens whose names occur in the text."""

    def token_name(self, index: int) -> str:
        """Look up the token of an id, as the vocabulary writes it."""

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids back into text, dropping beginnings and ends; what is not text becomes the replacement character."""

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        """Decode token by token. before: ids whose text is known already and is not given out."""


def with_boundaries(tokenizer: Tokenizer, ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Lay a document's text out as it is stored, with its beginning and, where that is another token, its end."""
    end = [] if tokenizer.end == tokenizer.begin else [tokenizer.end]
    return np.concatenate(([tokenizer.begin], ids, end), dtype=dtype, casting="unsafe")


class ByteTokenizer:
    """Every UTF-8 byte is its own id; the one id after them begins and ends documents."""

    name = "bytes"
    begin = end = 256
    vocab_size = num_ids = 257
    stops = frozenset((256,))
    fingerprint = "bytes-1"
    files: Mapping[str, bytes] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def encode_special(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    encode_published = encode_special

    def special_tokens(self, text: str) -> list[str]:
        return []

    def token_name(self, index: int) -> str:
        return str(index)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(index for index in map(int, ids) if index < self.end).decode(errors="replace")

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        return self._decoder.decode(bytes([index])) if index < ByteTokenizer.end else ""

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


class HuggingFaceTokenizer:
    """A tokenizer.json through the `tokenizers` library.

    files: it, and those of COMPANIONS that lie beside it, by name. begin, end: names of tokens that come
    before what the files say; None = as they say. Raises ConfigError.
    """

    def __init__(self, name: str, files: Mapping[str, bytes], begin: str | None = None, end: str | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        content = files["tokenizer.json"].decode()
        self.name = name
        self._backend: Any = Backend.from_str(content)
        self._backend.no_truncation()  # a file may carry the settings of the model it was made for
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # or a document that mentions a special token would contain it
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self._special = {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()
                         if token.special}
        self.num_ids = max(vocabulary.values(), default=-1) + 1
        settings = {file: _settings(name, file, files[file]) for file in SETTINGS_FILES if file in files}
        self.begin, self.end, self.stops = self._boundaries(settings, begin, end)
        parts = json.loads(content)
        never = self._special.keys() - {_unknown(parts["model"])}  # of special tokens, text has the unknown one alone
        self._never = np.array(sorted(self._special[token] for token in never), dtype=np.int64)
        plain = max((index for token, index in vocabulary.items() if token not in never), default=-1)
        self.vocab_size = max(plain, self.begin, self.end) + 1
        falls_back = '"ByteFallback"' in json.dumps(parts.get("decoder"))
        self.byte_ids = frozenset(index for token, index in vocabulary.items()
                                  if falls_back and re.fullmatch("<0x[0-9A-F]{2}>", token))
        digest = hashlib.sha256(content.encode()).hexdigest()
        self.fingerprint = f"tokenizer.json-2-{self.begin}-{self.end}-{digest}"
        self.files: Mapping[str, bytes] = dict(files)

    def _boundaries(
        self, settings: Mapping[str, Mapping[str, Any]], begin: str | None, end: str | None
    ) -> tuple[int, int, frozenset[int]]:
        """Find the tokens that begin and end a document: the keys, the model's own files, known names.

        -> the ids of the two, and all ids that end what is generated
        """
        tokenizer, numbers = settings.get("tokenizer_config.json", {}), {}
        for file in ("config.json", "generation_config.json"):  # the second counts where both speak
            numbers.update({key: value for key, value in settings.get(file, {}).items() if value is not None})
        before, after = self._template()
        begins = [self._named("begin_token", begin), before]
        if tokenizer.get("add_bos_token") is not False:
            begins += [self.id_of(tokenizer.get("bos_token")), *self._ids(numbers.get("bos_token_id"))]
        stops = self._ids(numbers.get("eos_token_id"))
        ends = [self._named("end_token", end), self.id_of(tokenizer.get("eos_token")), *stops, after,
                *map(self.id_of, BOUNDARY_NAMES)]
        first, last = (next((index for index in found if index is not None), None) for found in (begins, ends))
        first, last = last if first is None else first, first if last is None else last
        if first is None or last is None:
            raise ConfigError(f"data.tokenizer={self.name} has no token that can stand between documents: write "
                              f"data.end_token=NAME, or add one of {' '.join(BOUNDARY_NAMES)} to it")
        return first, last, frozenset((first, last, *stops))

    def _template(self) -> tuple[int | None, int | None]:
        """Find the special tokens that the tokenizer itself adds before and after a text."""
        encoding = self._backend.encode("a")
        special = encoding.special_tokens_mask
        if not encoding.ids or all(special):
            return None, None
        return encoding.ids[0] if special[0] else None, encoding.ids[-1] if special[-1] else None

    def _named(self, key: str, token: str | None) -> int | None:
        index = self.id_of(token)
        if token is not None and index is None:
            raise ConfigError(f"data.{key}={token}: data.tokenizer={self.name} has no such token: write one of its "
                              f"own, e.g. {' '.join(list(self._special)[:8]) or 'one of its added_tokens'}")
        return index

    def id_of(self, token: Any) -> int | None:
        """Look a token up. token: its name, or an object that holds it, as in tokenizer_config.json."""
        token = token.get("content") if isinstance(token, dict) else token
        return self._backend.token_to_id(token) if isinstance(token, str) else None

    def _ids(self, numbers: Any) -> list[int]:
        """numbers: an id or a list of ids, as in generation_config.json. -> those that the tokenizer knows"""
        listed = numbers if isinstance(numbers, list) else [numbers]
        return [index for index in listed if type(index) is int and 0 <= index < self.num_ids
                and self._backend.id_to_token(index) is not None]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._as_text(np.array(encoding.ids, dtype=np.int64)) for encoding in encodings]

    def _as_text(self, ids: np.ndarray) -> np.ndarray:
        """Spell special tokens in letters: models by words or by probability find them in a text by themselves."""
        found = np.isin(ids, self._never)
        if not found.any():
            return ids
        spelt: list[int] = []
        for index, special in zip(ids.tolist(), found.tolist(), strict=True):
            if not special:
                spelt.append(index)
                continue
            name = self._backend.id_to_token(index)
            for part in (name[:1], name[1:]):
                spelt += [token.id for token in self._backend.model.tokenize(part)]
        return np.array(spelt, dtype=np.int64)

    def encode_special(self, text: str) -> np.ndarray:
        return self._encode_special(text, False)

    def encode_published(self, text: str) -> np.ndarray:
        return self._encode_special(text, not text.startswith(self.token_name(self.begin)))

    def _encode_special(self, text: str, around: bool) -> np.ndarray:
        self._backend.encode_special_tokens = False
        try:
            return np.array(self._backend.encode(text, add_special_tokens=around).ids, dtype=np.int64)
        finally:
            self._backend.encode_special_tokens = True

    def special_tokens(self, text: str) -> list[str]:
        return [token for token in self._special if token in text]

    def token_name(self, index: int) -> str:
        return str(self._backend.id_to_token(index))

    def decode(self, ids: Iterable[int]) -> str:
        kept = [index for index in map(int, ids) if index not in (self.begin, self.end)]
        return str(self._backend.decode(kept, skip_special_tokens=False))

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        return _WindowStream(self, before)


class _WindowStream:
    """Decodes the last tokens again with each new one, and gives out what is new and certain."""

    def __init__(self, tokenizer: HuggingFaceTokenizer, before: Sequence[int]) -> None:
        self._tokenizer, self._window = tokenizer, list(before)[-WINDOW_TOKENS:]
        self._given = len(tokenizer.decode(self._window))  # characters of the window's text

    def push(self, index: int) -> str:
        self._window.append(index)
        if index in self._tokenizer.byte_ids:  # a run of bytes is text, or all of it is not
            return ""
        text = self._tokenizer.decode(self._window)
        piece = self._give(text, len(text) - text.endswith(MARK))  # half a character waits for its other bytes
        if len(self._window) >= WINDOW_TOKENS and self._given == len(text):
            self._window = self._window[-KEPT_TOKENS:]
            self._given = len(self._tokenizer.decode(self._window))
        return piece

    def rest(self) -> str:
        text = self._tokenizer.decode(self._window)
        return self._give(text, len(text))

    def _give(self, text: str, end: int) -> str:
        piece, self._given = text[self._given : end], max(self._given, end)
        return piece


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Share the text of one document's tokens out over them.

    A character of several tokens is shown on the last of them. -> for each id its text; they join to that of all
    """
    stream = tokenizer.stream()
    found = [stream.push(index) for index in ids]
    return [*found[:-1], found[-1] + stream.rest()] if found else []


def load_tokenizer(spec: str | None, begin: str | None = None, end: str | None = None) -> Tokenizer:
    """Load the tokenizer that the configuration names: `bytes`, or the path of a tokenizer.json.

    begin, end: data.begin_token and data.end_token. Raises ConfigError when a file is missing or no tokenizer, and for
    None, a tokenizer that nobody knows.
    """
    if spec is None:
        raise ConfigError("data.tokenizer is null, for the model came without its tokenizer: write the one that it was "
                          "trained with, data.tokenizer=PATH/tokenizer.json (or bytes)")
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    advice = "write bytes, or the path of a Hugging Face tokenizer.json"
    if path.is_dir():
        raise ConfigError(f"data.tokenizer={spec} is a directory: write {path / 'tokenizer.json'}")
    try:
        files = {name: read_bytes(path.parent / name) for name in COMPANIONS if (path.parent / name).is_file()}
        files["tokenizer.json"] = read_bytes(path)  # whatever it is called there
    except FileNotFoundError:
        raise ConfigError(f"data.tokenizer={spec}: no such file: {advice}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.tokenizer={spec} cannot be read ({error}): {advice}") from None
    try:
        return HuggingFaceTokenizer(spec, files, begin, end)
    except ConfigError:
        raise
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())
        raise ConfigError(f"data.tokenizer={spec} is not a Hugging Face tokenizer.json ({reason:.100}): "
                          f"{advice}") from None


def configured_tokenizer(data: DataConfig) -> Tokenizer:
    """Load the tokenizer of a run. Raises ConfigError."""
    return load_tokenizer(data.tokenizer, data.begin_token, data.end_token)


def tokenizer_of_checkpoint(data: DataConfig, folder: Path, step: int) -> Tokenizer:
    """Load the tokenizer that a checkpoint was trained with; its own copy counts, so that it can be moved.

    data: as read from its config.yaml. step: of the checkpoint. What was trained before data.begin_token was written
    there has one token before each document, by name alone. Raises ConfigError.
    """
    saved = folder / "tokenizer.json"
    spec = str(saved) if data.tokenizer != "bytes" and saved.exists() else data.tokenizer
    tokenizer = load_tokenizer(spec, data.begin_token, data.end_token)
    if step == 0 or "begin_token" in data.model_fields_set or not isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer
    boundary = next((token for token in BOUNDARY_NAMES if tokenizer.id_of(token) is not None), None)
    return load_tokenizer(spec, boundary, boundary)


def _unknown(model: Mapping[str, Any]) -> str | None:
    """model: of a tokenizer.json. -> the token that stands for what it has no other for"""
    index = model.get("unk_id")  # models by probability name it so
    return model.get("unk_token") if index is None else model["vocab"][index][0]


def _settings(name: str, file: str, content: bytes) -> dict[str, Any]:
    try:
        values = parse_json(content.decode("utf-8-sig"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"data.tokenizer={name}: {file} beside it is not a JSON object: mend it, or take it away")
    return values


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a model that has no rows for ids that text can have; special tokens that never occur need none.

    vocab_size: the model's. Raises ConfigError with what to write.
    """
    needed = tokenizer.vocab_size
    if needed > vocab_size:
        raise ConfigError(f"data.tokenizer={tokenizer.name} has {needed} ids but model.vocab_size={vocab_size}: write "
                          f"model.vocab_size={needed} or more (a multiple of 8, e.g. {-(-needed // 8) * 8}) for a new "
                          "model; for weights that there are, the tokenizer that they were trained with")
