"""Make the small checkpoints beside this file with Megatron-Core's own model and its own `dist_checkpointing.save`.

    pip download --no-deps megatron-core==0.16.1      # any folder; then unpack the wheel there
    PYTHONPATH=UNPACKED .venv/bin/torchrun --nproc-per-node 2 tests/checkpoint/megatron/make.py NAME KIND

NAME is the folder to make, KIND one of KINDS. Megatron-Core saves from GPUs alone: the calls that only ask for or
wait for a GPU are replaced here, and everything that is written comes from its own code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

VOCAB, SEQ, WIDTH, HEADS, GROUPS, HEAD_DIM, HIDDEN, EXPERTS = 32, 32, 8, 4, 2, 4, 16, 4
KINDS: dict[str, dict[str, Any]] = {  # arguments beside those that all have
    "mixtral": {},
    "dense": {"num_moe_experts": None},
    "mixed": {"moe_layer_freq": [0, 1]},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
                "moe_router_topk_scaling_factor": 2.5, "moe_shared_expert_intermediate_size": 16},
    "singleton": {"singleton": True},  # each layer, expert and half of a matrix under a name of its own
    "files": {"files": True},  # what a rank saves with --ckpt-format torch
}


def without_a_gpu() -> None:
    """Answer what is asked of a GPU, and let the CPU be the current device."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    cuda.set_device = lambda *_: None
    cuda.mem_get_info = lambda *_: (1 << 40, 1 << 40)
    from megatron.core.tensor_parallel import random as draws

    draws.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # its name is missing without Transformer Engine


def build(kind: dict[str, Any], ranks: int) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer import TransformerConfig

    settings = {name: value for name, value in kind.items() if name not in ("singleton", "files")}
    experts = settings.pop("num_moe_experts", EXPERTS)
    if experts:
        settings |= {
            "num_moe_experts": experts, "moe_router_topk": 2, "moe_ffn_hidden_size": HIDDEN,
            "moe_token_dispatcher_type": "allgather", "moe_aux_loss_coeff": 0.01,
            "moe_router_load_balancing_type": "aux_loss", "expert_model_parallel_size": ranks,
        }
        settings |= {name: value for name, value in kind.items() if name in settings}
    config = TransformerConfig(
        num_layers=2, hidden_size=WIDTH, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=HEAD_DIM,
        ffn_hidden_size=HIDDEN, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, normalization="RMSNorm", use_cpu_initialization=True, perform_initialization=True,
        bias_activation_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        attention_softmax_in_fp32=True, hidden_dropout=0.0, attention_dropout=0.0, **settings,
    )
    common = {"num_experts": experts, "moe_grouped_gemm": False, "normalization": "RMSNorm"}
    if isinstance(config.moe_layer_freq, list) and experts:
        spec = specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    else:
        spec = specs.get_gpt_layer_local_spec(**common)
    model = GPTModel(config, spec, VOCAB, SEQ, position_embedding_type="rope", rotary_base=10000,
                     share_embeddings_and_output_weights=False)
    generator = torch.Generator()
    first = dist.get_rank() * (experts or 0) // ranks  # of this rank's experts
    for name, parameter in model.named_parameters():
        whole = re.sub(r"local_experts\.(\d+)", lambda found: f"experts.{first + int(found[1])}", name)
        generator.manual_seed(zlib.crc32(whole.encode()))
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.linspace(-0.3, 0.4, buffer.numel()))
    return config, model.eval()


def arguments(config: Any, ranks: int) -> Namespace:
    """What Megatron-LM's training script keeps beside the weights, of what the model is."""
    given = {
        name: getattr(config, name) for name in (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
            "normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "attention_softmax_in_fp32",
            "apply_query_key_layer_scaling", "window_size", "rotary_interleaved", "moe_layer_freq", "moe_router_topk",
            "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_load_balancing_type",
            "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor",
            "moe_router_enable_expert_bias", "moe_router_bias_update_rate", "moe_aux_loss_coeff", "moe_z_loss_coeff",
            "moe_input_jitter_eps", "moe_expert_capacity_factor", "moe_grouped_gemm", "moe_token_dispatcher_type",
            "hidden_dropout", "attention_dropout", "init_method_std", "bf16", "fp16", "params_dtype",
        )
    }
    return Namespace(
        **given, num_experts=config.num_moe_experts, group_query_attention=True, seq_length=SEQ,
        max_position_embeddings=SEQ, padded_vocab_size=VOCAB, vocab_size=VOCAB, norm_epsilon=config.layernorm_epsilon,
        swiglu=True, position_embedding_type="rope", rotary_base=10000, rotary_percent=1.0,
        rotary_seq_len_interpolation_factor=None, use_rope_scaling=False, rope_scaling_factor=8.0,
        untie_embeddings_and_output_weights=True, make_vocab_size_divisible_by=32, tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1, expert_model_parallel_size=ranks if config.num_moe_experts else 1,
        expert_tensor_parallel_size=1, lr=1e-3, min_lr=0.0, lr_decay_style="linear", train_iters=4, micro_batch_size=1,
        global_batch_size=4, ckpt_format="torch_dist", use_dist_ckpt=True, transformer_impl="local",
    )


def optimizer_state(sharded: dict[str, Any]) -> dict[str, Any]:
    """Adam's first moments of the norms, under the names that Megatron's optimizer gives them."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    held = [value for value in nested_values(sharded) if isinstance(value, ShardedTensor) and "norm" in value.key]
    return {f"{index}": make_sharded_optimizer_tensor(tensor, torch.zeros_like(tensor.data), "optimizer.state.exp_avg")
            for index, tensor in enumerate(held)}


def main(folder: Path, kind: dict[str, Any]) -> None:
    dist.init_process_group("gloo")
    without_a_gpu()
    from megatron.core import __version__, dist_checkpointing, parallel_state

    ranks = dist.get_world_size()
    ep = ranks if kind.get("num_moe_experts", EXPERTS) else 1
    parallel_state.initialize_model_parallel(1, 1, expert_model_parallel_size=ep)
    config, model = build(kind, ep)
    metadata = {"singleton_local_shards": bool(kind.get("singleton")),
                "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {
        "args": arguments(config, ranks), "checkpoint_version": 3.0, "iteration": 4,
        "num_floating_point_operations_so_far": 12345.0,
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 16, "lr_decay_style": "linear"},
    }
    inner = folder / "iter_0000004"
    if dist.get_rank() == 0:
        inner.mkdir(parents=True)
    dist.barrier()
    if kind.get("files"):
        (inner / "mp_rank_00").mkdir()
        torch.save({**state, "model": model.state_dict_for_save_checkpoint()}, inner / "mp_rank_00/model_optim_rng.pt")
    else:
        sharded = model.sharded_state_dict(metadata=metadata)
        dist_checkpointing.save({**state, "model": sharded, "optimizer": optimizer_state(sharded)}, str(inner))
    if dist.get_rank() == 0:
        (folder / "latest_checkpointed_iteration.txt").write_text("4")
    tokens = torch.arange(SEQ)[None] * 7 % VOCAB
    hidden = torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        logits = model(tokens, torch.arange(SEQ)[None], hidden)[0] if ranks == 1 else None
    if logits is not None:
        (folder / "logits.json").write_text(json.dumps({
            "megatron_core": __version__, "tokens": tokens[0].tolist(),
            "logits": [[round(float(value), 6) for value in row] for row in logits[-4:]],
        }))
    dist.barrier()


if __name__ == "__main__":
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    main(Path(sys.argv[1]), KINDS[sys.argv[2]])
