"""What lies beside a model's weights and says how text goes in and out: its tokenizer, special tokens, chat template.

A run directory, each of its checkpoints and every export carry these files along. What an export needs and the source
does not have is made: a tokenizer.json of `bytes`, tokenizer_config.json, generation_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moescale.config import Config, ConfigError
from moescale.convert.containers import inside, refuse_pointer
from moescale.convert.mapping.mapped import Opened
from moescale.data.tokenizer import COMPANIONS, tokenizer_of_checkpoint
from moescale.files.reading import explain, parse_json, read_bytes

TOKENIZER, OLDER = "tokenizer.json", "tokenizer.model"
SETTINGS, GENERATION, CONFIG = "tokenizer_config.json", "generation_config.json", "config.json"
SPECIAL = "special_tokens_map.json"
END = "<|endoftext|>"  # what the boundary of `bytes` is called in an export


def read_companions(folder: Path) -> dict[str, bytes]:
    """Read what of these lies in a folder. Raises ConfigError for a file that leads elsewhere, or is none."""
    found = {}
    for name in COMPANIONS:
        if not (folder / name).exists():
            continue
        path = inside(folder, name)
        try:
            found[name] = read_bytes(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {explain(error)}") from None
        refuse_pointer(path, found[name])
    return found


def with_companions(opened: Opened, folder: Path) -> Opened:
    """Add the files of a checkpoint that another program wrote, and name its tokenizer, or say that it has none."""
    files = read_companions(folder)
    named = "tokenizer" in opened.config.data.model_fields_set  # by a configuration of MoEScale's
    tokenizer, notes = opened.config.data.tokenizer if named else None, list(opened.notes)
    if files.get(TOKENIZER) == bytes_tokenizer():
        tokenizer = "bytes"
        del files[TOKENIZER]
        files.pop(OLDER, None)
    elif TOKENIZER in files:
        tokenizer = TOKENIZER
    elif tokenizer != "bytes":
        tokenizer = None
        has = f"{OLDER} alone" if OLDER in files else "no tokenizer"
        cure = (f"transformers' AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...) writes the "
                f"{TOKENIZER} that MoEScale reads, or" if OLDER in files else "to train or generate,")
        notes.append(f"{folder} has {has}, so that data.tokenizer is null: {cure} write data.tokenizer=PATH")
    config = opened.config
    config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": tokenizer})})
    return replace(opened, config=config, files=files, notes=notes)


def write_companions(folder: Path, files: Mapping[str, bytes], config: Config, step: int) -> None:
    """Write them into an export, make what it lacks, and put data.begin_token and data.end_token in.

    step: that the source was trained to. Raises ConfigError.
    """
    config_json = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).exists() else None
    for name, content in files.items():
        if name != CONFIG:
            (folder / name).write_bytes(content)
    if config.data.tokenizer == "bytes":
        (folder / TOKENIZER).write_bytes(bytes_tokenizer())
        (folder / OLDER).write_bytes(bytes_sentencepiece())
    begin, end = _special_tokens(folder, config, step)
    if begin is not None and end is not None and SETTINGS not in files:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin[1], "eos_token": end[1],
                    "model_max_length": config.data.seq_len, "clean_up_tokenization_spaces": False}
        if config.data.tokenizer == "bytes":  # whatever stands in a text is text, and nothing is put before it
            settings |= {"split_special_tokens": True, "add_prefix_space": False, "add_bos_token": False,
                         "add_eos_token": False}
        write_json(folder / SETTINGS, settings)
    named = {key: token for key, name, token in (("bos_token", config.data.begin_token, begin),
                                                 ("eos_token", config.data.end_token, end)) if name and token}
    for file in (SETTINGS, SPECIAL, GENERATION):
        if named and file in files:  # the keys come before what the files say, here as in training
            values = _read_object(files[file])
            texts = {key: text for key, (_, text) in named.items()}
            write_json(folder / file, _ids_named(values, named) if file == GENERATION else values | texts)
    if config_json is None:
        return
    generation = _read_object(files.get(GENERATION))
    for key, token in (("bos_token_id", begin), ("eos_token_id", end)):
        if key not in config_json:
            config_json[key] = generation.get(key, carried_config(files).get(key, None if token is None else token[0]))
    config_json = _ids_named(config_json, named)
    write_json(folder / CONFIG, config_json)
    if GENERATION not in files:
        ids = {key: config_json[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
               if config_json.get(key) is not None}
        if ids:
            write_json(folder / GENERATION, ids)


def _ids_named(values: Mapping[str, Any], named: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """Put the ids of tokens that the configuration names; other ends stay beside the one that it names."""
    found = dict(values)
    for key, (index, _) in named.items():
        before = found.get(f"{key}_id")
        ends = before if isinstance(before, list) else [] if before is None else [before]
        others = [end for end in ends if end != index] if key == "eos_token" else []
        found[f"{key}_id"] = [index, *others] if others else index
    return found


def _special_tokens(folder: Path, config: Config, step: int) -> tuple[tuple[int, str] | None, tuple[int, str] | None]:
    """Find id and text of the tokens that begin and end a text, by the files in the export."""
    if not (folder / TOKENIZER).exists():
        return None, None
    try:
        tokenizer = tokenizer_of_checkpoint(config.data, folder, step)
    except ConfigError:  # which a run would be told; the files go across as they are
        return None, None
    texts = _texts(_read_object((folder / TOKENIZER).read_bytes()))
    return (tokenizer.begin, texts[tokenizer.begin]), (tokenizer.end, texts[tokenizer.end])


def padding_note(folder: Path, config: Config) -> str | None:
    """Say what llama.cpp makes of rows of the vocabulary that no token of the export's tokenizer has."""
    if not (folder / TOKENIZER).exists() or (folder / OLDER).exists():
        return None
    try:
        ids = tokenizer_of_checkpoint(config.data, folder, 0).num_ids
    except ConfigError:  # as in _special_tokens
        return None
    rows, model = config.model.vocab_size, _read_object((folder / TOKENIZER).read_bytes())["model"]
    if ids >= rows or not model.get("byte_fallback"):  # of other kinds it fills up the tokens
        return None
    return (f"model.vocab_size={rows} has {rows - ids} rows beyond the {ids} ids of the tokenizer: transformers takes "
            f"that, llama.cpp does not unless {OLDER} lies there: give {TOKENIZER} {rows - ids} more tokens, or a new "
            f"model {ids} rows")


def _texts(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    """Read the text of every token of a tokenizer.json."""
    vocabulary = tokenizer["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else (
        (entry[0], index) for index, entry in enumerate(vocabulary))
    added = ((token["content"], token["id"]) for token in tokenizer.get("added_tokens") or ())
    return {index: text for text, index in (*pairs, *added)}


def carried_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Read the config.json that came with the model, or with its tokenizer; nothing where there is none."""
    return _read_object(files.get(CONFIG))


def _read_object(content: bytes | None) -> dict[str, Any]:
    try:
        values = parse_json((content or b"{}").decode("utf-8-sig"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def bytes_tokenizer() -> bytes:
    """Make the tokenizer.json of `bytes`: each byte of UTF-8 is its own id, and 256 stands between documents."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that stand for themselves
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(sorted(set(range(256)) - set(shown)))}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    values: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": 256, "content": END, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}],
        "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {letters[byte]: byte for byte in range(256)}, "merges": []},
    }
    return json.dumps(values, ensure_ascii=False).encode()


def bytes_sentencepiece() -> bytes:
    """Make the tokenizer.model of `bytes`, which llama.cpp reads; transformers takes tokenizer.json.

    llama.cpp writes spaces as the mark U+2581 before it looks for pieces, so that this mark is the piece of id 32. The
    two ids after the boundary are never used: the format asks for an unknown piece and for all bytes.
    """
    normal, unknown, control, byte_piece = 1, 2, 3, 6
    pieces = [(f"<0x{byte:02X}>", byte_piece) for byte in range(256)]
    pieces[ord(" ")] = ("\N{LOWER ONE EIGHTH BLOCK}", normal)
    pieces += [(END, control), ("<unk>", unknown), ("<0x20>", byte_piece)]
    model = b"".join(_field(1, _field(1, text.encode()) + _field(3, kind)) for text, kind in pieces)
    trainer = _field(3, 2) + _field(4, len(pieces)) + _field(35, 1)  # pairs are merged; bytes are a last resort
    normalizer = _field(1, b"identity") + _field(3, 0) + _field(4, 0)  # no space before a text, all spaces kept
    return model + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | bytes) -> bytes:
    """Write a field of a protocol buffer."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
