"""What DeepSpeed is told of a run: its JSON out of our configuration, and a user's own laid over it.

Our keys decide what is computed. A file of the user's may say how DeepSpeed goes about it, such as bucket sizes and
offload; where it says something else than our keys do, or what was never shown to train alike, it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from moescale.config import Config, ConfigError, any_of
from moescale.engine.packages import OTHERWISE, check_package
from moescale.errors import refuse
from moescale.files.reading import explain, read_json

OLDEST, NEXT = (0, 19, 8), (0, 20)  # versions of DeepSpeed: the one that this was tested with, and where it ends
DEFAULT_STAGE = 3  # as the native engine shards: weights, gradients and optimizer state
AUTO = "auto"  # in files for Hugging Face's trainer: as the run says

GROUPS = ("zero_optimization", "optimizer", "optimizer.params", "bf16", "fp16", "data_types")  # of a file's keys
HARMLESS = {  # of a user's file: what it may say as it likes
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "log_level",
    "communication_data_type", "data_types.grad_accum_dtype", "optimizer.params.torch_adam",
    *(f"zero_optimization.{key}" for key in (
        "allgather_partitions", "allgather_bucket_size", "overlap_comm", "reduce_scatter", "reduce_bucket_size",
        "contiguous_gradients", "round_robin_gradients", "sub_group_size", "stage3_max_live_parameters",
        "stage3_max_reuse_distance", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
        "stage3_gather_16bit_weights_on_model_save", "offload_optimizer", "offload_param")),
}
HALF_STAGES = (1, 2)  # that hold weights in bfloat16 beside float32: 3 knows one dtype alone, and routers stay float32
OFFLOADS = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}  # the stages that can


def check(config: Config) -> None:
    """Refuse what is not installed, and what DeepSpeed cannot do with this run or was not shown to do.

    config: settled. Raises ConfigError, one line with the cure.
    """
    check_package("deepspeed", "deepspeed", OLDEST, NEXT)
    parallel = config.parallel
    ranks = parallel.dp_replicate * parallel.dp_shard * parallel.tp * parallel.cp * parallel.pp
    for key in ("tp", "pp", "dp_replicate"):
        degree = getattr(parallel, key)
        refuse(degree > 1, f"parallel.{key}={degree} does not run under run.engine=deepspeed, which shares weights out "
               f"over all ranks: write parallel.{key}=1, {OTHERWISE}")
    refuse(ranks == 1, "run.engine=deepspeed shares a run out over ranks, and one was started: start 2 or more with "
           f"torchrun or deepspeed, {OTHERWISE}")
    refuse(config.optim.name != "adamw", f"optim.name={config.optim.name} was not shown to train alike under "
           f"run.engine=deepspeed: write optim.name=adamw, {OTHERWISE}")
    refuse(config.optim.moments != "float32", f"optim.moments={config.optim.moments} has no counterpart under "
           f"run.engine=deepspeed, which keeps float32: write optim.moments=float32, {OTHERWISE}")
    refuse(config.precision.compute == "float64", "precision.compute=float64 has no counterpart under "
           f"run.engine=deepspeed, which keeps float32: write float32 or bfloat16, {OTHERWISE}")
    refuse(config.precision.reduce != "float32", f"precision.reduce={config.precision.reduce} was not shown to train "
           f"alike under run.engine=deepspeed: write precision.reduce=float32, {OTHERWISE}")
    refuse(parallel.compile, "parallel.compile=true was not shown to train alike under run.engine=deepspeed: write "
           f"parallel.compile=false, {OTHERWISE}")
    refuse(parallel.row_budget is not None, f"parallel.row_budget={parallel.row_budget} was not shown to train alike "
           f"under run.engine=deepspeed: write parallel.row_budget=null, {OTHERWISE}")
    refuse(config.spikes.on_not_finite == "skip", "spikes.not_finite=skip leaves updates out, which "
           f"run.engine=deepspeed cannot: write spikes.not_finite=stop or back, {OTHERWISE}")
    refuse(config.run.audit_every is not None, "run.audit_every runs steps twice, which run.engine=deepspeed cannot: "
           f"write run.audit_every=null, {OTHERWISE}")
    if settings(config)["zero_optimization"]["stage"] == 3:
        mixers = sorted({layer.mixer for layer in config.model.layers} - {"attention"})
        unproven = [f"the mixer {mixers[0]}"] if mixers else []
        unproven += ["parallel.recompute=selective"] if parallel.recompute == "selective" else []
        refuse(bool(unproven), f"{' and '.join(unproven)} was not shown to train alike where ranks share out weights "
               f"(ZeRO 3): write run.zero_stage=2, {OTHERWISE}")


def settings(config: Config) -> dict[str, Any]:
    """Make DeepSpeed's own configuration. config: settled. Raises ConfigError for a file that says something else."""
    path = config.run.deepspeed
    theirs = {} if path is None else _read(path)
    stage = theirs.get("zero_optimization.stage", DEFAULT_STAGE) if config.run.zero_stage is None else (
        config.run.zero_stage)
    refuse(stage not in (0, 1, 2, 3), f"{path}: zero_optimization.stage={stage} must be 0, 1, 2 or 3")
    known = _counterparts(config, stage)
    for name, said in theirs.items():
        if name in known:
            key, value, ours = known[name]
            refuse(not _same(said, value), f"{path} says {name}={_written(said)}, and {key}={_written(ours)}: write "
                   f"the same in both, or leave {name} out of {path}")
        refuse(name not in known and name not in HARMLESS, f"{path} says {name}, which was not shown to train alike: "
               f"leave it out of {path}")
    for name, stages in OFFLOADS.items():
        device = dict(theirs.get(f"zero_optimization.{name}") or {}).get("device", "none")
        refuse(device not in ("none", "cpu"), f"{path} says {name}.device={device}, whose state no checkpoint of a run "
               f"can hold: write cpu, or leave {name} out of {path}")
        refuse(device == "cpu" and stage not in stages, f"{path} says {name}, and the stage of ZeRO is {stage}: write "
               f"{any_of(stages)} as the stage, or leave {name} out of {path}")
    micro_batch, ranks = config.data.micro_batch, config.parallel.dp_shard
    assert micro_batch is not None
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": max(batch // ranks // micro_batch for batch in config.data.batches),
        "gradient_clipping": (config.optim.clip_norm or 0.0) if stage > 0 else 0.0,  # without ZeRO it knows no experts
        "bf16": {"enabled": stage in HALF_STAGES and config.precision.compute == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32",
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9,
    }
    for name, said in theirs.items():
        if name in HARMLESS and not name.startswith("optimizer."):
            home, _, key = name.rpartition(".")
            (made[home] if home else made)[key] = said
    return made


def _counterparts(config: Config, stage: int) -> dict[str, tuple[str, Any, Any]]:
    """List what our keys decide: DeepSpeed's name for it, our key, the value in its words and in ours."""
    data, optim, compute = config.data, config.optim, config.precision.compute
    assert data.micro_batch is not None
    passes = data.global_batch // config.parallel.dp_shard // data.micro_batch
    half = compute == "bfloat16"
    return {
        "train_batch_size": ("data.global_batch", data.global_batch, data.global_batch),
        "train_micro_batch_size_per_gpu": ("data.micro_batch", data.micro_batch, data.micro_batch),
        "gradient_accumulation_steps": ("data.global_batch / parallel.dp_shard / data.micro_batch", passes, passes),
        "gradient_clipping": ("optim.clip_norm", optim.clip_norm or 0, optim.clip_norm),
        "gradient_allreduce_op": ("this engine's", "mean", "mean"),
        "zero_allow_untested_optimizer": ("this engine's", True, True),
        "zero_force_ds_cpu_optimizer": ("this engine's", False, False),
        "zero_optimization.stage": ("run.zero_stage", stage, stage),
        "bf16.enabled": ("precision.compute", half, compute), "fp16.enabled": ("precision.compute", False, compute),
        "optimizer.type": ("optim.name", "AdamW", "adamw"),
        **{f"optimizer.params.{key}": (f"optim.{key}", getattr(optim, key), getattr(optim, key))
           for key in ("lr", "betas", "eps", "weight_decay")},
    }


def _read(path: str) -> dict[str, Any]:
    """Read a user's file, the names of its keys joined with dots, without what it leaves to others ("auto")."""
    try:
        said = read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"no such file: run.deepspeed={path}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"run.deepspeed={path} cannot be read as JSON: {explain(error)}") from None
    refuse(not isinstance(said, dict), f"run.deepspeed={path} must hold a JSON object, such as "
           '{"zero_optimization": {"stage": 2}}')
    return dict(_flat(said, ""))


def _flat(said: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in said.items():
        name = f"{above}{key}"
        if name in GROUPS and isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        elif value != AUTO:
            yield name, value


def _same(said: Any, ours: Any) -> bool:
    if isinstance(ours, tuple):
        return isinstance(said, list) and tuple(said) == ours
    return type(said) in (type(ours), int, float) and said == ours


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
