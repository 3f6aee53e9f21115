"""A tokenizer shaped as Llama's, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

MARK = "\N{LOWER ONE EIGHTH BLOCK}"


def write_metaspace(folder: Path, extra: dict[str, bool] | None = None, **settings: object) -> Path:
    """Write a tokenizer.json into a new folder. -> its path

    A mark stands for the space, a first space is added and taken off again, other characters are several bytes; <s>
    begins a text. extra: further added tokens, special or not. Further arguments: settings beside it, by file.
    """
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
    folder.mkdir(parents=True)
    for name, values in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
