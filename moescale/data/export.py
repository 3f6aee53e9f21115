"""Write the tokens of a corpus as Megatron's indexed datasets, for this project and for others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moescale.config import DataConfig
from moescale.data.documents import INDEXED
from moescale.data.indexed import refuse_existing, write_indexed
from moescale.data.token_file import prepare_tokens
from moescale.data.tokenizer import configured_tokenizer
from moescale.errors import refuse


def export(config: DataConfig, prefix: Path) -> Iterator[str]:
    """Write what a run would train on, each entry of a blend apart, and what it would hold out.

    prefix: what the names of the files begin with. Yields lines that say what was written and how it is read. Raises
    ConfigError, also where one of the files exists, and OSError.
    """
    names = [f"train_{number}" for number in range(len(config.weights))] or ["train"]
    paths = {name: prefix.with_name(f"{prefix.name}_{name}") for name in (*names, "held_out")}
    for path in paths.values():
        refuse_existing(path)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokenizer, corpus = configured_tokenizer(config), prepare_tokens(config)
    yield from corpus.notes
    streams = (corpus.train,) if corpus.blend is None else corpus.blend.parts
    for path, stream in zip(paths.values(), (*streams, corpus.held_out), strict=True):
        refuse(not stream.num_documents, f"{path}{INDEXED} would hold no document, for all of them are held out: name "
               "more text in data.files")
        documents, tokens = write_indexed(path, stream.documents(), tokenizer)
        yield f"{path}{INDEXED}: {tokens:,} tokens of {documents:,} documents"
    trained = [str(paths[name]) for name in names]
    weights = f" 'data.weights={list(config.weights)}'" if config.weights else ""
    yield (f"train on: 'data.files=[{', '.join(path + INDEXED for path in trained)}]'{weights} "
           f"'data.held_out_files=[{paths['held_out']}{INDEXED}]' data.tokenizer={tokenizer.name}")
    if config.weights:
        trained = [f"{weight:g} {path}" for weight, path in zip(config.weights, trained, strict=True)]
    yield f"in Megatron: --train-data-path {' '.join(trained)} --valid-data-path {paths['held_out']}"
