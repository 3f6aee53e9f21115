"""Megatron-Core checkpoints as a format: the distributed one, and the files of its ranks."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moescale.checkpoint.archive import read_archive
from moescale.checkpoint.index import read_metadata, read_object
from moescale.checkpoint.plain_pickle import Record
from moescale.checkpoint.strided_view import Stored
from moescale.config import Config, ConfigError
from moescale.convert.containers import (
    Sizes,
    create_distributed,
    create_pickle,
    inside,
    open_distributed,
    sizes_by_file,
)
from moescale.convert.formats.megatron.names import (
    DISTRIBUTED,
    OF_RANKS,
    OTHER_NAMES,
    RANK_NAMES,
    read_arguments,
    refuse,
    ungated,
    write_arguments,
)
from moescale.convert.formats.native import native_weights
from moescale.convert.mapping.mapped import FileLayout, Opened
from moescale.convert.mapping.table import At, Cut, NativeName, Piece, Row, Weights, matches, piece, row, with_copies
from moescale.files.reading import read_text

NAME = "megatron"
LARGEST_NAME = 1000  # bytes
__all__ = ["NAME", "create", "detect", "finish", "open_checkpoint", "plan", "refuse"]
TRACKER, ITERATION = "latest_checkpointed_iteration.txt", "iter_0000000"
COMMON, METADATA = "common.pt", "metadata.json"
COMMON_OBJECT = "common_state/shard_0_1"  # where newer versions keep what common.pt held
RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
MODEL_FILE = "model_optim_rng.pt"
LEFT_OUT = {
    r"(chained_\d+\.)?optimizer\..*": "the optimizer's state stays in Megatron", r".*_extra_state.*": "no weight",
    r"rng_state.*": "MoEScale's draws follow from the seed", r".*(local_)?tokens_per_expert": "counts of a step",
    r".*rotary_pos_emb\.inv_freq": "it follows from rotary_base",
}


def detect(path: Path) -> bool:
    return (path / TRACKER).is_file() or (path / METADATA).is_file() or any(path.glob("mp_rank_*"))


def open_checkpoint(path: Path) -> Opened:
    """Open a folder of Megatron-LM's, or one iteration's. Raises ConfigError."""
    folder = path
    if (path / TRACKER).is_file():
        last = read_text(inside(path, TRACKER), LARGEST_NAME).strip()
        folder = path / (last if last == "release" else f"iter_{int(last):07d}" if last.isdigit() else "?")
        if not folder.is_dir():
            raise ConfigError(f"{path / TRACKER} names {last!r}, which is not there")
    return _open_distributed(folder) if (folder / METADATA).is_file() else _open_ranks(folder)


def _arguments(values: Any) -> Namespace:
    """Take the arguments that Megatron keeps among the values of a file; none where they are no arguments."""
    found = values.get("args") if isinstance(values, Mapping) else None
    return Namespace(**found.attributes()) if isinstance(found, Record) else Namespace()


def _left_out(names: Sequence[str]) -> dict[str, str]:
    return {name: why for name in names for pattern, why in LEFT_OUT.items()
            if re.fullmatch(pattern, name.rpartition(":")[2])}


def stored_arguments(folder: Path) -> Namespace:
    """Read the arguments that an iteration's folder keeps. Raises ConfigError."""
    if (folder / METADATA).is_file():
        return _arguments(_common(folder, read_metadata(folder))[0])
    first = min(inner.name for inner in folder.glob("mp_rank_*"))
    return _arguments(read_archive(inside(folder, f"{first}/{MODEL_FILE}")))


def _common(folder: Path, metadata: Metadata) -> tuple[Any, Path]:
    """Read what a distributed checkpoint keeps beside tensors. Returns it, and where it lies."""
    if (folder / COMMON).is_file():
        return read_archive(inside(folder, COMMON)), folder / COMMON
    stored = read_object(folder, metadata, COMMON_OBJECT)  # a list of the one object
    return stored[0] if isinstance(stored, list) and stored else None, folder


def _open_distributed(folder: Path) -> Opened:
    metadata = read_metadata(folder)
    common, path = _common(folder, metadata)
    config = read_arguments(_arguments(common), str(path))
    names = [name for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)]
    left_out = _left_out(names)
    tensors = open_distributed(folder, metadata, left_out)
    weights = native_weights(config)
    pieces = _distributed_pieces(config, weights, _kind_of(tensors), tensors)
    return Opened(NAME, folder, config, FileLayout(style="torch_dist"), weights, tensors, pieces, left_out)


def _kind_of(names: Iterable[str]) -> str:
    """Tell by its names which table of DISTRIBUTED a checkpoint follows."""
    if any(name.startswith("decoder.layers.self_attention") for name in names):
        return "stacked"
    return "apart" if any(name.endswith("linear_fc1.weight_w") or ".experts.experts.0." in name
                          for name in names) else "numbered"


def _gated(config: Config, rows: Sequence[Row]) -> Sequence[Row]:
    activation = config.moe.activation if config.num_moe_layers else config.feed_forward.activation
    return rows if activation in ("swiglu", "geglu") else ungated(rows)


def _distributed_pieces(
    config: Config, weights: Weights, kind: str, present: Mapping[str, Any] | None = None
) -> list[Piece]:
    found = []
    for entry, native in matches(_gated(config, DISTRIBUTED[kind]), weights, config):
        layer, expert = native.layer or 0, native.expert or 0
        key = entry.foreign.format(layer=layer, expert=expert)
        key = _present(key, present) if present is not None else _fused(key, config, layer)
        at = At(config, layer, expert, config.moe.num_experts, config.model.num_layers)
        found.append(piece(entry, native, weights[native], key, at))
    return with_copies(found)


def _present(key: str, present: Mapping[str, Any]) -> str:
    """Choose the key, or what it is called where a norm is fused with the matrix behind it, whichever is there."""
    others = (key.replace(old, new) for old, new in OTHER_NAMES.items())
    return key if key in present else next((other for other in others if other in present), key)


def _fused(key: str, config: Config, layer: int) -> str:
    """Name a weight as Transformer Engine does: a dense layer's second norm is fused, a mixture's is not."""
    for old, new in OTHER_NAMES.items():
        if old != "pre_mlp_layernorm.weight" or config.model.layers[layer].channel_mixer == "feed_forward":
            key = key.replace(old, new)
    return key


def _open_ranks(folder: Path) -> Opened:
    """Open the files of all ranks; what lies in several of them must be the same in all."""
    tensors: dict[str, Stored] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    args = Namespace()
    for inner in sorted(folder.glob("mp_rank_*")):
        found = RANK.fullmatch(inner.name)
        if found is None:
            raise ConfigError(f"{folder} holds {inner.name}, which names no rank: mp_rank_00 and mp_rank_00_001 do")
        values = read_archive(inside(folder, f"{inner.name}/{MODEL_FILE}"))
        if not isinstance(values, Mapping) or not isinstance(values.get("model"), Mapping):
            raise ConfigError(f"{inner / MODEL_FILE} has no `model`"
                              + (": virtual pipeline stages are not read" if "model0" in values else ""))
        args = _arguments(values) if values.get("args") else args
        ranks[inner.name] = tuple(int(number) for number in found.groups() if number is not None)
        stored = {name: value for name, value in values["model"].items() if isinstance(value, Stored)}
        tensors |= {f"{inner.name}:{name}": value for name, value in stored.items()}
    config = read_arguments(args, str(folder))
    style = _style(tensors)
    layout = _layout(args, style)
    files = {name: _model_ranks(numbers, layout, name) for name, numbers in ranks.items()}
    weights = native_weights(config)
    return Opened(NAME, folder, config, layout, weights, tensors, _rank_pieces(config, weights, layout, files, tensors),
                  _left_out(list(tensors)))


def _layout(args: Namespace, style: str) -> FileLayout:
    words = ("expert", "tensor", "pipeline")
    ep, tp, pp = (int(getattr(args, f"{word}_model_parallel_size", 1) or 1) for word in words)
    return FileLayout(ep, tp, pp, int(getattr(args, "expert_tensor_parallel_size", None) or tp), style)


def _style(tensors: Mapping[str, Stored]) -> str:
    if any(name.endswith("experts.weight1") for name in tensors):
        return "grouped"
    grouped = any(re.search(r"experts\.linear_fc1\.weight\d+$", name) for name in tensors)
    return "te_grouped" if grouped else "sequential"


def _model_ranks(numbers: tuple[int, ...], layout: FileLayout, name: str) -> tuple[int, int, int]:
    """Read the ranks of tp, pp and ep from a file's name, which leaves out a number that is always 0."""
    rest = list(numbers[1:])
    if len(rest) != (layout.pp > 1) + (layout.ep > 1):
        raise ConfigError(f"{name} does not fit a checkpoint of {layout.pp} stages and {layout.ep} ranks of experts")
    return numbers[0], rest.pop(0) if layout.pp > 1 else 0, rest.pop(0) if layout.ep > 1 else 0


def _files(layout: FileLayout) -> dict[str, tuple[int, int, int]]:
    """Name the file of each rank, with its ranks of tp, pp and ep."""
    files = {}
    for tp in range(layout.tp):
        for pp in range(layout.pp):
            for ep in range(layout.ep):
                name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if layout.pp > 1 else "")
                files[name + (f"_{ep:03d}" if layout.ep > 1 else "")] = (tp, pp, ep)
    return files


def _rank_pieces(
    config: Config, weights: Weights, layout: FileLayout, files: Mapping[str, tuple[int, int, int]],
    present: Mapping[str, Any] | None = None,
) -> list[Piece]:
    """Say what each rank's file holds: layers and experts have the numbers that they have on that rank."""
    found = []
    rows = [*_gated(config, RANK_NAMES), *_gated(config, OF_RANKS[layout.style or "sequential"])]
    if config.model.tied_embeddings and layout.pp > 1:
        rows.append(row("embedding.weight", "output_layer.weight"))  # the last stage's copy
    layers, experts = config.model.num_layers // layout.pp, config.moe.num_experts // layout.ep
    for file, (tp, pp, ep) in files.items():
        for entry, native in _held(rows, weights, config, layout, pp, ep):
            layer, expert = native.layer or 0, native.expert or 0
            key = entry.foreign.format(layer=layer % layers, expert=expert % experts)
            if layout.style == "te_grouped":
                key = _fused(key, config, layer)
            if present is not None:
                key = _present(f"{file}:{key}", present).partition(":")[2]
            cut = Cut(tp, layout.tp) if native.expert is None else Cut(tp % layout.etp, layout.etp)
            at = At(config, layer, expert % experts, experts)
            found.append(piece(entry, native, weights[native], f"{file}:{key}", at, cut))
    return with_copies(found)


def pieces_of_rank(config: Config, layout: FileLayout, tp: int, pp: int, ep: int) -> list[Piece]:
    """Say what the model of one rank holds, by the names of its tensors there. tp, pp, ep: the rank in each of these"""
    found = _rank_pieces(config, native_weights(config), layout, {"": (tp, pp, ep)})
    return [replace(piece, key=piece.key.removeprefix(":")) for piece in found]


def _held(
    rows: Sequence[Row], weights: Weights, config: Config, layout: FileLayout, pp: int, ep: int
) -> Iterator[tuple[Row, NativeName]]:
    layers, experts = config.model.num_layers // layout.pp, config.moe.num_experts // layout.ep
    for entry, native in matches(rows, weights, config):
        if native.layer is None:
            stage = 0 if entry.foreign.startswith("embedding") else layout.pp - 1
        else:
            stage = native.layer // layers
        if stage == pp and (native.expert is None or native.expert // experts == ep):
            yield entry, native


def settled(layout: FileLayout) -> FileLayout:
    """Choose a style where none is given: the distributed one, unless files of ranks are asked for."""
    style = layout.style or ("torch_dist" if layout == FileLayout() else "sequential")
    return FileLayout(layout.ep, layout.tp, layout.pp, layout.etp, style)


def plan(config: Config, layout: FileLayout, weights: Weights) -> list[Piece]:
    layout = settled(layout)
    if layout.style != "torch_dist":
        return _rank_pieces(config, weights, layout, _files(layout))
    return _distributed_pieces(config, weights, _kind(config))


def _kind(config: Config) -> str:
    return "stacked" if len(set(config.layers)) == 1 else "numbered"


def create(
    folder: Path, config: Config, layout: FileLayout, pieces: Sequence[Piece], sizes: Sizes, opened: Opened
) -> dict[str, Stored]:
    """Lay out one iteration and the file that names it."""
    layout = settled(layout)
    (folder / TRACKER).write_text("0", encoding="utf-8")
    inner = folder / ITERATION
    inner.mkdir()
    values = {"args": write_arguments(config, layout), "checkpoint_version": 3.0, "iteration": 0}
    if layout.style != "torch_dist":
        return _create_ranks(inner, values, sizes)
    create_pickle(inner / COMMON, values, "", {})
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{name}_version": 1 for name in backends}
    (inner / METADATA).write_text(json.dumps({**backends, **versions}), encoding="utf-8")
    files = {f"__{index}_0.distcp": {key: size} for index, (key, size) in enumerate(sizes.items())}
    stacked = int(_kind(config) == "stacked")
    leading = {key: stacked * ("layers." in key) + (".experts.experts." in key) for key in sizes}
    return create_distributed(inner, files, leading)


def _create_ranks(folder: Path, values: Mapping[str, Any], sizes: Sizes) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file, file_sizes in sizes_by_file(sizes).items():
        (folder / file).mkdir()
        places = create_pickle(folder / file / MODEL_FILE, values, "model", file_sizes)
        tensors |= {f"{file}:{name}": stored for name, stored in places.items()}
    return tensors


def finish(folder: Path, opened: Opened) -> None:
    """Nothing is left to do."""
