"""What Megatron-Core is told of a run: our configuration in its words, and what it cannot do, by our keys.

What the model is follows from the arguments that a converted checkpoint holds; here they become those of Megatron's
classes. Nothing of the package is imported, so that a run is refused without it.
"""

from __future__ import annotations

from typing import Any

import torch

from moescale.config import Config, ConfigError
from moescale.convert.formats.megatron.files import NAME
from moescale.convert.formats.megatron.names import inexpressible, write_arguments
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.run import differences
from moescale.engine.packages import OTHERWISE, check_package
from moescale.errors import refuse

OLDEST, NEXT = (0, 16, 1), (0, 17)  # versions of Megatron-Core: the one that this was tested with, and where it ends
SAME_NAME = (  # in the arguments of Megatron-LM's script and in Megatron-Core's TransformerConfig
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "normalization", "add_bias_linear", "add_qkv_bias", "tensor_model_parallel_size",
    "pipeline_model_parallel_size")
OF_MIXTURES = (
    "moe_layer_freq", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax",
    "moe_router_enable_expert_bias", "moe_router_bias_update_rate", "moe_router_topk_scaling_factor",
    "moe_router_num_groups", "moe_router_group_topk", "moe_router_load_balancing_type", "moe_aux_loss_coeff",
    "moe_z_loss_coeff", "moe_shared_expert_intermediate_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size")
DISPATCHERS = {"all_to_all": "alltoall", "all_gather": "allgather"}  # ours: theirs


def check(config: Config) -> None:
    """Refuse what is not installed, and what Megatron-Core cannot do with this run or was not shown to do.

    config: settled. Raises ConfigError, one line with the cure.
    """
    check_package("megatron", "megatron-core", OLDEST, NEXT)
    check_device()
    for named in (*differences(config, NAME), *inexpressible(config)):
        raise ConfigError(f"{named} has no counterpart under run.engine=megatron: write run.engine=native")
    for key, value, bad, instead in _unlike(config):
        refuse(bad, f"{key}={value} has no counterpart under run.engine=megatron, or was not shown to train alike: "
               f"write {key}={instead}, {OTHERWISE}")
    model, parallel, mixtures = config.model, config.parallel, config.num_moe_layers
    refuse(parallel.tp > 1 and mixtures > 0, f"parallel.tp={parallel.tp} with mixtures of experts needs sequence "
           "parallelism, which Megatron-Core has with Transformer Engine's layers alone: write parallel.tp=1, "
           f"{OTHERWISE}")
    sizes = {"attention.num_kv_heads": (config.attention.num_kv_heads, "tp"),
             "model.vocab_size": (model.vocab_size, "tp"), "model.num_layers": (model.num_layers, "pp")}
    for name, (size, degree) in sizes.items():
        ranks = getattr(parallel, degree)
        refuse(size % ranks != 0, f"parallel.{degree}={ranks} must divide {name}={size} under run.engine=megatron: "
               f"write another, {OTHERWISE}")


def _unlike(config: Config) -> list[tuple[str, Any, bool, str]]:
    """List keys, their values, whether they are refused, and what to write instead."""
    parallel, moe, mixtures = config.parallel, config.moe, config.num_moe_layers > 0
    pipeline = parallel.pp > 1 and parallel.pp_schedule != "1f1b"
    return [
        ("optim.name", config.optim.name, config.optim.name != "adamw", "adamw"),
        ("optim.moments", config.optim.moments, config.optim.moments != "float32", "float32"),
        ("precision.compute", config.precision.compute, config.precision.compute == "float64",
         "float32 or bfloat16"),
        ("precision.reduce", config.precision.reduce, config.precision.reduce != "float32", "float32"),
        ("parallel.dp_replicate", parallel.dp_replicate, parallel.dp_replicate > 1, "1"),
        ("parallel.cp", parallel.cp, parallel.cp > 1, "1"),
        ("parallel.etp", parallel.etp, parallel.etp > 1, "1"),
        ("parallel.pp_schedule", parallel.pp_schedule, pipeline, "1f1b"),
        ("parallel.dispatcher", parallel.dispatcher, mixtures and parallel.dispatcher not in DISPATCHERS,
         "all_to_all"),
        ("parallel.dispatch_chunks", parallel.dispatch_chunks, mixtures and parallel.dispatch_chunks > 1, "1"),
        ("parallel.row_budget", parallel.row_budget, parallel.row_budget is not None, "null"),
        ("parallel.recompute", parallel.recompute, parallel.recompute != "none", "none"),
        ("parallel.compile", str(parallel.compile).lower(), parallel.compile, "false"),
        ("model.z_loss_coefficient", config.model.z_loss_coefficient, config.model.z_loss_coefficient > 0, "0"),
        ("moe.capacity_factor", moe.capacity_factor, mixtures and moe.capacity_factor is not None, "null"),
        ("moe.jitter", moe.jitter, mixtures and moe.jitter > 0, "0"),
        ("moe.expert_dropout", moe.expert_dropout, mixtures and moe.expert_dropout > 0, "0"),
        ("moe.balance_over", moe.balance_over, mixtures and moe.balance_over == "global_batch", "micro_batch"),
        ("spikes.not_finite", "skip", config.spikes.on_not_finite == "skip", "stop or back"),
        ("run.audit_every", config.run.audit_every, config.run.audit_every is not None, "null"),
    ]


def transformer_settings(config: Config) -> dict[str, Any]:
    """Make the arguments of Megatron's TransformerConfig that say what the model is and how it is cut.

    config: settled. Windows are part of the mask of each batch, since Megatron's own knows no documents.
    """
    args = vars(write_arguments(config, layout_of(config)))
    settings = {name: args[name] for name in SAME_NAME} | {
        "layernorm_epsilon": args["norm_epsilon"], "gated_linear_unit": args["swiglu"],
        "activation_func": torch.nn.functional.silu if args["swiglu"] else torch.nn.functional.gelu,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
    }
    if config.precision.compute == "bfloat16":
        settings |= {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    else:
        settings["pipeline_dtype"] = torch.float32
    if config.num_moe_layers:
        settings |= {name: args[name] for name in OF_MIXTURES} | {
            "num_moe_experts": args["num_experts"], "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": DISPATCHERS[config.parallel.dispatcher]}
    return settings


def model_settings(config: Config) -> dict[str, Any]:
    """Make the arguments of Megatron's GPTModel beside that."""
    attention, model = config.attention, config.model
    return {
        "vocab_size": model.vocab_size, "max_sequence_length": config.data.seq_len,
        "position_embedding_type": attention.positions, "rotary_base": attention.rope_theta,
        "share_embeddings_and_output_weights": model.tied_embeddings,
    }


def layout_of(config: Config) -> FileLayout:
    """Say over how many ranks Megatron cuts this run's model, whose experts lie one by one."""
    parallel = config.parallel
    return FileLayout(parallel.ep, parallel.tp, parallel.pp, parallel.etp, "sequential")



def check_device() -> None:
    """Refuse a machine without the GPUs that Megatron-Core's layers compute on. Raises ConfigError."""
    refuse(not torch.cuda.is_available(), "run.engine=megatron computes on GPUs alone, and torch sees none here: start "
           "it on a machine with CUDA, or write run.engine=native")
