"""A small Hugging Face tokenizer for the tests of this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from tests.support import tokenizers as tokenizer_files

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
    """Give a function from a folder's name, and what `tests.support.tokenizers` takes, to a file as Llama's."""
    return lambda folder, *others, **settings: tokenizer_files.write_metaspace(tmp_path / folder, *others, **settings)
