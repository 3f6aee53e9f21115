"""Megatron-Core's own loader and model take what was written, on one rank and cut over two."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moescale
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.run import convert, open_source
from moescale.parallel.ranks import run_ranks
from tests.support.models import make_config, write_run

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core"),
              pytest.mark.slow]
TOKENS = torch.arange(40).view(2, 20) * 7 % 264


def megatron_logits(folder: Path, ep: int) -> Tensor:
    """Build Megatron's model on each rank's processor, let its loader fill it, and run it where one rank has it all."""
    dist.init_process_group("gloo")
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    CudaRNGStatesTracker.fork = lambda self, name=None: nullcontext()
    moe_utils.te_general_gemm = None  # its name is missing without Transformer Engine
    parallel_state.initialize_model_parallel(1, 1, expert_model_parallel_size=ep)
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, kv_channels=8, ffn_hidden_size=32,
        num_moe_experts=12, moe_router_topk=2, moe_ffn_hidden_size=24, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, normalization="RMSNorm",
        use_cpu_initialization=True, perform_initialization=False, moe_token_dispatcher_type="allgather",
        moe_router_load_balancing_type="none", bias_activation_fusion=False, masked_softmax_fusion=False,
        attention_softmax_in_fp32=True, gradient_accumulation_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
        expert_model_parallel_size=ep,
    )
    spec = get_gpt_layer_local_spec(num_experts=12, moe_grouped_gemm=False, normalization="RMSNorm")
    del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]  # named as with Transformer Engine
    model = GPTModel(config, spec, 264, 64, position_embedding_type="rope", rotary_base=10**6,
                     share_embeddings_and_output_weights=False).eval()
    loaded = dist_checkpointing.load(model.sharded_state_dict(), str(folder), strict="log_all")
    assert not model.load_state_dict(loaded, strict=False).missing_keys
    if ep > 1:
        return torch.cat([expert.linear_fc1.weight.detach().flatten()
                          for expert in model.decoder.layers[1].mlp.experts.local_experts])
    hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model(TOKENS, torch.arange(20).expand(2, 20), hidden)


def test_its_own_model_has_our_logits(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_config({"window": None}))
    convert(open_source(run), tmp_path / "megatron", "megatron", FileLayout())
    folder = tmp_path / "megatron/iter_0000000"
    theirs = run_ranks(1, megatron_logits, folder, 1)[0]
    model = moescale.load(run)
    ours = model.logits(TOKENS)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    experts = model.blocks["1"].channel_mixer.experts
    cut = run_ranks(2, megatron_logits, folder, 2)
    assert torch.equal(torch.cat(cut), torch.cat((experts.gate, experts.up), 1).detach().flatten())
