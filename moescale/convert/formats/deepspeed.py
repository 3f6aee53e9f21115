"""DeepSpeed checkpoints: a file a rank of model parallelism, a file an expert, and ZeRO's partitions gathered.

DeepSpeed names weights as the user's own module does. Here these are MoEScale's names, with its mixture of experts
where MoEScale's lies, or MoEScale's own, as the engine on DeepSpeed has it. It stores no sizes of the model:
`config.yaml` beside `latest` says what it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from moescale.checkpoint.archive import read_archive
from moescale.checkpoint.plain_pickle import Record
from moescale.checkpoint.strided_view import Shape, Stored
from moescale.config import Config, ConfigError, load_config
from moescale.convert.containers import Sizes, create_pickle, inside, sizes_by_file
from moescale.convert.formats.megatron.arguments import refuse_changes, words
from moescale.convert.formats.native import native_weights, with_moments
from moescale.convert.formats.zero_partitions import gather
from moescale.convert.mapping.mapped import FileLayout, Opened
from moescale.convert.mapping.table import At, Cut, Piece, Weights, matches, piece, row, stacked_experts, with_copies
from moescale.files.reading import read_text

NAME = "deepspeed"
LARGEST_NAME = 1000  # bytes
TAG, LATEST, CONFIG = "global_step0", "latest", "config.yaml"
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
OTHER_ORDER = "use_data_before_expert_parallelism"
MODEL = "mp_rank_00_model_states.pt"
ITS_EXPERT = re.compile(r"\.deepspeed_experts\.(\d+)\.")
OWN_EXPERTS = re.compile(r"\.channel_mixer\.experts\.(?:gate|up|down)$")
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
    partitions = {int(found[1]): name for name in names if (found := OPTIMIZER_FILE.fullmatch(name))}
    if partitions and len(ranks) > 1:
        raise ConfigError(f"{folder}: ZeRO's partitions beside model parallelism are not gathered")

    # what the files hold: of each rank of model parallelism its own names, of ZeRO all that the optimizer updates
    models, tensors = {}, dict[str, Stored]()
    for name in names:
        if MODEL_FILE.fullmatch(name):
            values = read_archive(inside(folder, name))
            _refuse_settings(values, config, str(folder / name))
            if not isinstance(values, Mapping) or not isinstance(values.get("module"), Mapping):
                raise ConfigError(f"{folder / name} has no `module`")
            models[name] = values
            if partitions:  # of stage 3 there are more, with the same names
                break
    first = next(iter(models.values()))
    has_its_layers = any(".deepspeed_moe." in key for key in first["module"])
    weights = native_weights(config)
    if partitions:
        settings = first.get("ds_config")
        if isinstance(settings, Mapping) and settings.get(OTHER_ORDER):
            raise ConfigError(f"{folder}: ds_config {OTHER_ORDER}=true gives ranks an order in which ZeRO's partitions "
                              "are not gathered: save the checkpoint without it")
        apart = _Spread(config, first["param_shapes"])
        gathered = gather(folder, first, partitions, apart)
        tensors = {apart.key(*found): stored for found, stored in gathered[None].items()}
        tensors |= {f"{MODEL}:{key}": first["module"][key] for key in first["buffer_names"]}
    else:
        read = [(name, values["module"]) for name, values in models.items()]
        read += [(name, read_archive(inside(folder, name))) for name in names if EXPERT_FILE.fullmatch(name)]
        for name, held in read:
            tensors |= {f"{name}:{key}": value for key, value in held.items() if isinstance(value, Stored)}

    # where each native tensor lies in them
    if has_its_layers or len(ranks) > 1:
        layout = FileLayout(tp=len(ranks), etp=_expert_tensor(config, tensors, len(ranks)))
        pieces = plan(config, layout, weights)
    else:
        layout = FileLayout()
        pieces = _plan_own(config, weights, {key: stored.shape for key, stored in tensors.items()}, folder)
    if not partitions or not _has_moments(gathered, config):
        return Opened(NAME, folder, config, layout, weights, tensors, pieces)
    moments = [moment for moment in gathered if moment is not None]
    tensors |= {f"{apart.key(*found)}.{moment}": stored for moment in moments
                for found, stored in gathered[moment].items()}
    pieces += [replace(each, native=each.native._replace(moment=moment), key=f"{each.key}.{moment}")
               for each in pieces if weights[each.native].learns for moment in moments]
    state = {"step": first["global_steps"], "seed": config.run.seed}
    return Opened(NAME, folder, config, layout, with_moments(weights, config), tensors, pieces, state=state)


def _has_moments(gathered: Mapping[str | None, Any], config: Config) -> bool:
    """Say whether the partitions hold what the run's optimizer keeps."""
    return config.optim.name == "adamw" and {"exp_avg", "exp_avg_sq"} == gathered.keys() - {None}


class _Spread:
    """Which ranks hold other experts than others do, by the names and shapes of a rank's weights."""

    def __init__(self, config: Config, groups: Sequence[Mapping[str, Any]]) -> None:
        self.config = config
        found = [int(match[1]) for group in groups for name in group if (match := ITS_EXPERT.search(name))]
        self.local_experts = max(found, default=-1) + 1
        self.mixtures = _mixtures(config)

    def __call__(self, name: str, shape: Shape) -> int:
        """Count the ranks that together hold all of a weight of which a rank holds this."""
        moe = self.config.moe
        if ITS_EXPERT.search(name):
            return moe.num_experts // self.local_experts
        if OWN_EXPERTS.search(name) and prod(shape):
            return moe.num_experts * moe.d_ff * self.config.model.d_model // prod(shape)
        return 1

    def key(self, name: str, position: int) -> str:
        """Name the tensor that a rank in this position has, as the files would that hold it whole."""
        found = ITS_EXPERT.search(name)
        if found is None:
            return f"{MODEL}:{name}" if not OWN_EXPERTS.search(name) else f"{_expert_rank(position)}:{name}"
        expert = position * self.local_experts + int(found[1])
        layer = self.mixtures.index(int(name.split(".")[1]))
        return (f"layer_{layer}_expert_{expert}_{MODEL}:{name[: found.start(1)]}{expert}{name[found.end(1) :]}")


def _expert_rank(position: int) -> str:
    return f"expp_rank_{position}"


def _mixtures(config: Config) -> list[int]:
    return [index for index, layer in enumerate(config.model.layers) if layer.channel_mixer == "moe"]


def _plan_own(config: Config, weights: Weights, shapes: Mapping[str, Shape], folder: Path) -> list[Piece]:
    """Plan a checkpoint of MoEScale's own layers, whose experts are stacked, on each rank its part of them."""
    found = []
    for native, weight in weights.items():
        name = ".".join(native.weight)
        at = At(config, native.layer or 0)
        if native.expert is None:
            found.append(piece(row(name, name), native, weight, f"{MODEL}:{name}", at))
            continue
        if f"{MODEL}:{name}" in shapes:  # without ZeRO, of the first rank alone
            local, slices, key = shapes[f"{MODEL}:{name}"][0], 1, f"{MODEL}:{name}"
            if local != config.moe.num_experts:
                raise ConfigError(f"{folder} holds the experts of its first rank alone, {local} of "
                                  f"{config.moe.num_experts}, as DeepSpeed saves them without ZeRO: save with "
                                  "moescale's own checkpoint, or with stage 1, 2 or 3")
        else:
            parts = [shape for key, shape in shapes.items() if key.endswith(f":{name}")]
            local, key = (parts[0][0] if parts else config.moe.num_experts), ""
            slices = max(1, len(parts) * local // config.moe.num_experts)
        at = replace(at, expert=native.expert % local, num_experts=local)
        for part in range(slices):
            place = key or f"{_expert_rank(native.expert // local * slices + part)}:{name}"
            found.append(piece(row(name, name, stacked_experts()), native, weight, place, at, Cut(part, slices)))
    return found


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
    mixtures, found = _mixtures(config), []
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

