"""A small Hugging Face tokenizer for the tests of this folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

MARK = "\N{LOWER ONE EIGHTH BLOCK}"
TEXT = "def hello(name):\n    return f'hello {name}, this is a document'\n"


@pytest.fixture
def train_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """Give a function from a file's name and special tokens to the path of a new byte-level tokenizer.json.

    It also truncates, pads and adds a special token, as many published ones do.
    """

    def train(name: str, *special: str) -> Path:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), show_progress=False,
                                                 initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
        backend.train_from_iterator([TEXT] * 4, trainer)
        if special:
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{special[0]} $A", special_tokens=[(special[0], backend.token_to_id(special[0]))])
        backend.enable_truncation(8)
        backend.enable_padding(length=64)
        backend.save(str(tmp_path / name))
        return tmp_path / name

    return train


@pytest.fixture
def write_metaspace(tmp_path: Path) -> Callable[..., Path]:
    """Give a function from a folder's name to the tokenizer.json in it of a new tokenizer shaped as Llama's.

    A mark stands for the space, a first space is added and taken off again, other characters are several bytes; <s>
    begins a text. extra: further added tokens, special or not. Further arguments: settings beside it, by file.
    """

    def write(folder: str, extra: dict[str, bool] | None = None, **settings: object) -> Path:
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), MARK, *"abhelo",
                  MARK + "a", MARK + "h", MARK + "he", MARK + "hel", MARK + "hell", MARK + "hello"]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        merges = [(MARK, "a"), *((MARK + "hello"[:length], "hello"[length]) for length in range(5))]
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(
            vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.normalizer = tokenizers.normalizers.Sequence([
            tokenizers.normalizers.Prepend(MARK), tokenizers.normalizers.Replace(" ", MARK)])
        backend.decoder = tokenizers.decoders.Sequence([
            tokenizers.decoders.Replace(MARK, " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0)])
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        added = {"<unk>": True, "<s>": True, "</s>": True, **(extra or {})}
        for token, special in added.items():
            backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
        (tmp_path / folder).mkdir()
        for name, values in settings.items():
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(values))
        backend.save(str(tmp_path / folder / "tokenizer.json"))
        return tmp_path / folder / "tokenizer.json"

    return write
