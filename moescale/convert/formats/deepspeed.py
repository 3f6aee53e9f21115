"""DeepSpeed checkpoints: a file a rank of model parallelism, a file an expert, and ZeRO's partitions gathered.

DeepSpeed names weights as the user's own module does. Here these are MoEScale's names, with its mixture of experts
where MoEScale's lies. It stores no sizes of the model: `config.yaml` beside `latest` says what it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch

from moescale.checkpoint.archive import read_archive
from moescale.checkpoint.plain_pickle import Record
from moescale.checkpoint.strided_view import Chunk, Region, Shape, Stored
from moescale.config import Config, ConfigError, load_config
from moescale.convert.containers import Sizes, create_pickle, inside, sizes_by_file
from moescale.convert.formats.megatron.arguments import refuse_changes, words
from moescale.convert.formats.native import native_weights
from moescale.convert.mapping.mapped import FileLayout, Opened
from moescale.convert.mapping.table import At, Cut, Piece, Weights, matches, piece, row, with_copies
from moescale.files.reading import read_text

NAME = "deepspeed"
LARGEST_NAME = 1000  # bytes
TAG, LATEST, CONFIG = "global_step0", "latest", "config.yaml"
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MIXER = "blocks.{layer}.channel_mixer."
MOE = MIXER + "deepspeed_moe."
TABLE = (
    *(row(name, name) for name in (
        "embedding.weight", "blocks.{layer}.mixer_norm.weight",
        *(f"blocks.{{layer}}.mixer.{part}.weight" for part in "qkvo"), "blocks.{layer}.channel_norm.weight",
        *(f"{MIXER}{part}.weight" for part in ("gate", "up", "down")),
        *(f"{MIXER}shared.{part}.weight" for part in ("gate", "up", "down")), "norm.weight", "head.weight",
    )),
    row(MIXER + "router.weight", MOE + "gate.wg.weight"),
)
EXPERTS = tuple(row(f"{MIXER}experts.{part}", MOE + f"experts.deepspeed_experts.{{expert}}.{part}.weight")
                for part in ("gate", "up", "down"))
ROUTERS = ("mixtral", "switch", "gshard")  # what its gate can do
HARMLESS = words("""
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
    optimizer scheduler communication_data_type seq_parallel_communication_data_type prescale_gradients
    gradient_predivide_factor gradient_allreduce_op sparse_gradients fp16 bf16 bfloat16 amp torch_autocast
    data_types gradient_clipping max_grad_norm zero_optimization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown memory_breakdown dump_state disable_allgather
    disable_python_gc activation_checkpointing tensorboard wandb csv_monitor comet flops_profiler autotuning
    elasticity comms_logger checkpoint data_efficiency curriculum_learning pipeline eigenvalue aio nebula
    hybrid_engine dataloader_drop_last use_node_local_storage use_data_before_expert_parallelism compile
    tensor_parallel sequence_parallel_size timers log_level vocabulary_size load_universal monitor_config local_rank
    data_parallel_group global_rank keep_in_fp32_modules zenflow datastates
""")  # of DeepSpeed's own settings: those that say how is trained, watched and saved, not what


def detect(path: Path) -> bool:
    folder = _tag(path) if (path / LATEST).is_file() else path
    return any(MODEL_FILE.fullmatch(file.name) for file in folder.glob("*"))


def _tag(path: Path) -> Path:
    tag = read_text(inside(path, LATEST), LARGEST_NAME).strip()
    folder = path / tag
    if not folder.resolve().is_relative_to(path.resolve()) or not folder.is_dir():
        raise ConfigError(f"{path / LATEST} names {tag!r}, which is not there")
    return folder


def open_checkpoint(path: Path) -> Opened:
    """Open a folder with `latest`, or one tag's. Raises ConfigError."""
    folder = _tag(path) if (path / LATEST).is_file() else path
    beside = next((near / CONFIG for near in (path, folder, folder.parent) if (near / CONFIG).is_file()), None)
    if beside is None:
        raise ConfigError(f"{path} does not say which model it is: put the run's {CONFIG} into it")
    config = load_config(beside, whole=True)
    names = sorted(file.name for file in folder.iterdir())
    ranks = sorted({int(found[2]) for name in names if (found := MODEL_FILE.fullmatch(name))})
    zero = {int(found[1]): name for name in names if (found := OPTIMIZER_FILE.fullmatch(name))}
    tensors: dict[str, Stored] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if MODEL_FILE.fullmatch(name):
            values = read_archive(inside(folder, name))
            _refuse_settings(values, config, str(folder / name))
            if zero and not config.num_moe_layers:
                tensors |= _gather(folder, values, zero, len(ranks))
                break
            module = values.get("module") if isinstance(values, Mapping) else None
            if not isinstance(module, Mapping):
                raise ConfigError(f"{folder / name} has no `module`")
            tensors |= {f"{name}:{key}": value for key, value in module.items() if isinstance(value, Stored)}
        elif EXPERT_FILE.fullmatch(name):
            values = read_archive(inside(folder, name))
            tensors |= {f"{name}:{key}": value for key, value in values.items() if isinstance(value, Stored)}
    if zero and config.num_moe_layers:
        left_out |= dict.fromkeys(zero.values(), "float32 copies of a mixture of experts are not gathered")
    weights = native_weights(config)
    layout = FileLayout(tp=len(ranks), etp=_expert_tensor(config, tensors, len(ranks)))
    pieces = plan(config, layout, weights)
    return Opened(NAME, folder, config, layout, weights, tensors, pieces, left_out)


def _refuse_settings(values: Any, config: Config, source: str) -> None:
    """Refuse what a file says of the model that MoEScale does not compute. Raises ConfigError."""
    if not isinstance(values, Mapping):
        return
    settings = values.get("ds_config")
    for name, value in settings.items() if isinstance(settings, Mapping) else ():
        if name not in HARMLESS and _acts(value):
            raise ConfigError(f"{source}: ds_config {name}={value!s:.80} is not known to leave the model as it is: "
                              "if it does, save the checkpoint without it")
    experts = [number for number in values.get("num_experts") or [] if number != 1]  # 1 where a layer has none
    if any(number != config.moe.num_experts for number in experts) or (experts and not config.num_moe_layers):
        raise ConfigError(f"{source}: num_experts={experts} is not what its {CONFIG} says: moe.num_experts="
                          f"{config.moe.num_experts} in {config.num_moe_layers} layers")
    args = values.get("args")
    if isinstance(args, Record):  # of Megatron-DeepSpeed
        refuse_changes(args.attributes(), source)


def _acts(value: Any) -> bool:
    """Say whether a setting does something: one that is not enabled, or of which no part is, does not."""
    if not isinstance(value, Mapping):
        return bool(value)
    return bool(value["enabled"]) if "enabled" in value else any(_acts(part) for part in value.values())


def _expert_tensor(config: Config, tensors: Mapping[str, Stored], tp: int) -> int:
    """Find etp: tp where the experts' files hold a part of each, 1 where they hold the whole."""
    rows = [stored.shape[0] for key, stored in tensors.items() if key.endswith(".up.weight") and EXPERT_FILE.match(key)]
    return tp if rows and rows[0] < config.moe.d_ff else 1


def _gather(folder: Path, values: Mapping[str, Any], zero: Mapping[int, str], ranks: int) -> dict[str, Stored]:
    """Find each weight in ZeRO's flat float32 partitions, as if the model's file held them."""
    if ranks > 1:
        raise ConfigError(f"{folder}: ZeRO's partitions beside model parallelism are not gathered")
    states = [read_archive(inside(folder, zero[rank]))["optimizer_state_dict"] for rank in sorted(zero)]
    shapes = [{name: tuple(size) for name, size in group.items()} for group in values["param_shapes"]]
    if "fp32_flat_groups" in states[0]:
        flat = [state["fp32_flat_groups"] for state in states]
        merged = {name: size for group in shapes for name, size in group.items()}
        found = _split_each(merged, flat)
    else:
        flat = [state["single_partition_of_fp32_groups"] for state in states]
        found = {}
        for index, group in enumerate(shapes):
            found |= _split_once(group, [part[index] for part in flat])
    return {f"mp_rank_00_model_states.pt:{name}": stored for name, stored in found.items()}


def _split_once(shapes: Mapping[str, Shape], parts: Sequence[Stored]) -> dict[str, Stored]:
    """Stages 1 and 2: a group's weights one after another, the whole cut into equal parts."""
    ends = list(accumulate(prod(part.shape) for part in parts))
    found, start = {}, 0
    for name, shape in shapes.items():
        stop = start + prod(shape)
        chunks = []
        for part, end in zip(parts, ends, strict=True):
            begin, first, last = end - prod(part.shape), max(start, end - prod(part.shape)), min(stop, end)
            if first < last:
                chunks.append(_chunk(part, first - begin, first - start, last - first))
        found[name] = Stored(parts[0].dtype, shape, tuple(chunks))
        start = stop
    return found


def _split_each(shapes: Mapping[str, Shape], groups: Sequence[Sequence[Stored]]) -> dict[str, Stored]:
    """Stage 3: each weight is cut into equal parts, one a rank; a rank's parts lie one after another in its groups."""
    found, start = {}, 0
    for name, shape in shapes.items():
        size = prod(shape)
        share = -(-size // len(groups))
        chunks = []
        for rank, parts in enumerate(groups):
            count = min(share, size - rank * share)
            begin = 0
            for part in parts:
                first, last = max(start, begin), min(start + count, begin + prod(part.shape))
                if first < last:
                    chunks.append(_chunk(part, first - begin, rank * share + first - start, last - first))
                begin += prod(part.shape)
        found[name] = Stored(groups[0][0].dtype, shape, tuple(chunks))
        start += share
    return found


def _chunk(part: Stored, begin: int, goal: int, count: int) -> Chunk:
    """Elements of a flat partition, from `begin` on, as those of a weight from `goal` on."""
    chunk = part.chunks[0]
    return Chunk(chunk.path, chunk.offset + begin * part.dtype.itemsize, Region(goal, (count,), (1,)))


def refuse(config: Config, layout: FileLayout, dtype: torch.dtype | None) -> None:
    """Refuse what DeepSpeed's gate cannot do, what `--verify` could not follow, and layouts that files cannot have."""
    for key, left_out in (("norm", "none"), ("residual", "rezero"), ("embedding_positions", "sinusoidal")):
        if getattr(config.model, key) == left_out:
            raise ConfigError(f"model.{key}={left_out} cannot be written for DeepSpeed: convert --to moescale")
    if config.num_moe_layers and config.moe.router not in ROUTERS:
        raise ConfigError(f"moe.router={config.moe.router} cannot be expressed by DeepSpeed's gate: convert --to "
                          "moescale or megatron")
    if config.num_moe_layers and not config.moe.normalize_weights and config.moe.top_k > 1:
        raise ConfigError("moe.normalize_weights=false cannot be expressed by DeepSpeed's gate, which weighs several "
                          "experts by their shares of what is chosen: convert --to moescale or megatron")
    if config.num_moe_layers and config.moe.normalizes and config.moe.top_k == 1 < config.moe.num_experts:
        raise ConfigError("moe.top_k=1 with moe.router=mixtral cannot be expressed by DeepSpeed's gate, which weighs "
                          "one expert by its share of all: convert --to moescale")
    if layout.style is not None:
        raise ConfigError(f"--style {layout.style}: a DeepSpeed checkpoint has one style, leave it out")
    if layout.pp > 1:
        raise ConfigError(f"--pp {layout.pp}: DeepSpeed's pipelines name layers by their place in the user's own list; "
                          "leave it out")
    moe, model = config.moe, config.model
    if layout.etp not in (1, layout.tp):
        raise ConfigError(f"--etp {layout.etp} must be 1 or --tp {layout.tp}")
    for name, size, key in (
        ("moe.num_experts", moe.num_experts, "ep"), ("attention.num_kv_heads", config.attention.num_kv_heads, "tp"),
        ("model.vocab_size", model.vocab_size, "tp"), ("moe.d_ff", moe.d_ff, "etp"),
    ):
        if size % getattr(layout, key):
            raise ConfigError(f"--{key} {getattr(layout, key)} must divide {name}={size}")


def plan(config: Config, layout: FileLayout, weights: Weights) -> list[Piece]:
    mixtures = [index for index, layer in enumerate(config.model.layers) if layer.channel_mixer == "moe"]
    found = []
    for rank in range(layout.tp):
        for entry, native in matches((*TABLE, *EXPERTS), weights, config):
            layer, expert = native.layer or 0, native.expert
            file = "" if expert is None else f"layer_{mixtures.index(layer)}_expert_{expert}_"
            key = f"{file}mp_rank_{rank:02d}_model_states.pt:{entry.foreign.format(layer=layer, expert=expert)}"
            cut = Cut(rank, layout.tp) if expert is None else Cut(rank % layout.etp, layout.etp)
            found.append(piece(entry, native, weights[native], key, At(config, layer), cut))
    return with_copies(found)


def create(
    folder: Path, config: Config, layout: FileLayout, pieces: Sequence[Piece], sizes: Sizes, opened: Opened
) -> dict[str, Stored]:
    """Lay out one tag, and the files that name it and its model."""
    (folder / LATEST).write_text(TAG, encoding="utf-8")
    (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    inner = folder / TAG
    inner.mkdir()
    values: dict[str, Any] = {
        "buffer_names": [], "optimizer": None, "param_shapes": None, "frozen_param_shapes": None, "shared_params": None,
        "frozen_param_fragments": None, "lr_scheduler": None, "data_sampler": None, "random_ltd": None,
        "sparse_tensor_module_names": [], "skipped_steps": 0, "global_steps": 0, "global_samples": 0,
        "dp_world_size": layout.ep, "mp_world_size": layout.tp, "ds_config": {}, "ds_version": "0.19.8",
        "num_experts": [config.moe.num_experts] * config.num_moe_layers,
    }
    tensors: dict[str, Stored] = {}
    for file, file_sizes in sizes_by_file(sizes).items():
        is_expert = EXPERT_FILE.fullmatch(file) is not None
        places = create_pickle(inner / file, {} if is_expert else values, "" if is_expert else "module", file_sizes)
        tensors |= {f"{file}:{name}": stored for name, stored in places.items()}
    return tensors


def finish(folder: Path, opened: Opened) -> None:
    """Nothing is left to do."""

