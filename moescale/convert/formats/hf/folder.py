"""Which files of a Hugging Face folder are the model, and why others are not."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moescale.checkpoint.strided_view import Stored
from moescale.config import ConfigError
from moescale.convert.containers import inside, open_safetensors, refuse_pointer
from moescale.files.reading import parse_json, read_bytes, read_text

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
PREFIXES = {  # of tensor names: who leaves them, and how to save without them
    "_orig_mod.": "torch.compile leaves it: save model._orig_mod instead",
    "module.": "DistributedDataParallel and DeepSpeed leave it: save model.module instead",
    "base_model.": "peft leaves it: save model.merge_and_unload() instead",
}


def detect(path: Path) -> bool:
    return (path / CONFIG).is_file() and any(path.glob("*.safetensors*"))


def read_object(path: Path) -> dict[str, Any]:
    """Read an object of JSON. Raises ConfigError."""
    try:
        content = read_bytes(path)
        refuse_pointer(path, content)
        values = parse_json(content.decode("utf-8-sig"))
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no JSON object")
    return values


def open_tensors(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """Read the headers of the model's files, which are those that transformers takes.

    model.safetensors comes first, then what the index names; without both, all shards that are there.
    Returns where each tensor lies, by name, and what was left aside. Raises ConfigError.
    """
    there = sorted(file.name for file in path.glob("*.safetensors"))
    weight_map: dict[str, str] | None = None
    if SINGLE in there:
        names = [SINGLE]
    elif (path / INDEX).exists():
        weight_map = _read_index(path)
        names = sorted(set(weight_map.values()))
    else:
        names = [name for name in there if name.startswith("model")]
        if not names:
            raise ConfigError(why_no_model(path) or f"{path} holds no {SINGLE}")
    tensors: dict[str, Stored] = {}
    for name in names:
        found = open_safetensors(inside(path, name))[0]
        twice = found.keys() & tensors.keys()
        if twice:
            raise ConfigError(f"{path} holds {min(twice)} twice, in {name} and in another file")
        wrong = [key for key in found if weight_map is not None and weight_map.get(key) != name]
        if wrong:
            raise ConfigError(f"{path}: {wrong[0]} lies in {name}, but {INDEX} does not say so")
        tensors.update(found)
    missing = [key for key in weight_map or {} if key not in tensors and not key.endswith(".rotary_emb.inv_freq")]
    if missing:
        raise ConfigError(f"{path} is not whole: {missing[0]} is missing in {(weight_map or {})[missing[0]]}")
    _refuse_prefix(path, tensors)
    return tensors, _left_aside(path, names, there)


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_object(inside(path, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConfigError(f"{path / INDEX} has no weight_map of names")
    return weight_map


def _left_aside(path: Path, taken: list[str], there: list[str]) -> list[str]:
    """Say what else looks like weights, so that nobody takes it for what was converted."""
    left = sorted(set(there) - set(taken))
    if SINGLE in taken and (path / INDEX).exists():
        left.append(INDEX)
    notes = []
    if left:
        notes.append(f"taken: {', '.join(taken[:3])}, as transformers does; not looked at: {', '.join(left)}")
    if (path / "adapter_config.json").exists():
        notes.append("an adapter lies beside the model, and was not merged into it")
    return notes


def _refuse_prefix(path: Path, tensors: Mapping[str, Stored]) -> None:
    for prefix, why in PREFIXES.items():
        if tensors and all(name.startswith(prefix) for name in tensors):
            raise ConfigError(f"{path}: all names of tensors have the prefix {prefix}: {why} (transformers does not "
                              "find them either)")
    if "score.weight" in tensors:
        raise ConfigError(f"{path} holds score.weight, the head of a classifier or reward model: take a model that "
                          "predicts text, with lm_head.weight")
    if "embed_tokens.weight" in tensors:
        raise ConfigError(f"{path}: the names of tensors lack the prefix model., for they were saved without a head: "
                          "load them with transformers' AutoModelForCausalLM and save that")


def why_no_model(path: Path) -> str | None:
    """Say why a folder that looks like Hugging Face's holds no model to read; None for others."""
    if (path / "snapshots").is_dir():
        found = sorted(inner for inner in (path / "snapshots").iterdir() if inner.is_dir())
        with suppress(OSError, ValueError):
            main = read_text(path / "refs/main").strip()
            found.sort(key=lambda inner: inner.name == main)  # last, if it is there
        return f"{path} is a folder of the Hugging Face cache: write {found[-1]}" if found else None
    names = {file.name for file in path.iterdir() if file.is_file() or file.is_symlink()}
    models = sorted(name for name in names if name.endswith(".safetensors")
                    and not name.startswith(("adapter_model", "consolidated")))
    pickles = sorted(name for name in names if name.endswith((".bin", ".pth", ".pt")) and name != "training_args.bin")
    if models and CONFIG not in names:
        return f"{path} holds {models[0]}, but no {CONFIG}, which says what model it is of: put it there"
    if any(name.startswith("adapter_model") for name in names) and not models:
        return (f"{path} holds an adapter (LoRA) and not the model that it changes: merge them first "
                "(peft's merge_and_unload) and save the result")
    if "consolidated.safetensors" in names and not models:
        return (f"{path} holds Mistral's own format (consolidated.safetensors): take the same model's folder with "
                f"{SINGLE} or its shards")
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if gguf and not models:
        return f"{path} holds {gguf[0]}, which is llama.cpp's: take the same model's folder with {SINGLE}"
    if CONFIG in names and pickles and not models:
        return (f"{path} holds its weights as {pickles[0]}, a pickle, which may run code: load them with transformers "
                f"and save_pretrained(...), which writes {SINGLE}")
    return f"{path} holds no {SINGLE} and no shards of one" if CONFIG in names else None
