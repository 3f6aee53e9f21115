"""Megatron-Core's own loader and model take what was written, on one rank and cut over two."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moescale.comm.collectives import local_tensor
from moescale.config import Config
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.run import convert, open_source
from moescale.engine.megatron_settings import layout_of
from moescale.engine.megatron_weights import NativeWeights
from moescale.model.build import build_model as build_own_model
from moescale.parallel.ranks import run_ranks
from tests.support.models import make_config, make_tensors, write_run

pytest.importorskip("megatron.core", reason="needs megatron-core")
from megatron.core import dist_checkpointing, parallel_state

from moescale.engine.megatron import build_model, hidden_keys
from tests.support.megatron import SHAPES, on_processor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TOKENS = torch.arange(40).view(2, 20) * 7 % 264


def named_as_with_transformer_engine(sharded: dict[str, Any], config: Config) -> dict[str, Any]:
    """Give the second norms of mixtures the names that they have in most checkpoints, beside local layers' own."""
    for name, tensor in sharded.items():
        layer = name.removeprefix("decoder.layers.").partition(".")[0]
        if name.endswith("pre_mlp_layernorm.weight") and config.model.layers[int(layer)].channel_mixer == "moe":
            tensor.key = tensor.key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    return sharded


def load(folder: Path, config: Config) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Let its loader fill its model. Returns its logits, where one rank has it all, and this rank's part of ours."""
    on_processor()
    dist.init_process_group("gloo")
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        parallel.tp, expert_model_parallel_size=parallel.ep, expert_tensor_parallel_size=1)
    model = build_model(config).eval()
    sharded = named_as_with_transformer_engine(model.sharded_state_dict(), config)
    with torch.serialization.safe_globals([argparse.Namespace]):  # of common.pt
        loaded = dist_checkpointing.load(sharded, str(folder), strict="log_all")
    assert not model.load_state_dict(loaded, strict=False).missing_keys
    rank = dist.get_rank()
    weights = NativeWeights(config, layout_of(config), (rank % parallel.tp, 0, rank % parallel.ep))
    shown = {name: local_tensor(tensor).detach() for name, tensor in weights.show(model.state_dict())}
    if dist.get_world_size() > 1:
        return None, shown
    with torch.no_grad():
        positions = torch.arange(20).expand(2, 20)
        return model(TOKENS, positions, hidden_keys(positions, config.attention.window)), shown


def part_of(whole: Tensor, part: Tensor, rank: int) -> Tensor:
    """Take the half of a weight that a rank of two has, or all of it."""
    cut = [dim for dim in range(whole.ndim) if whole.shape[dim] != part.shape[dim]]
    return whole.chunk(2, cut[0])[rank] if cut else whole


@pytest.mark.parametrize("shape", [
    pytest.param(shape, marks=pytest.mark.slow if shape in ("gelu", "mixed") else ()) for shape in SHAPES])
def test_its_own_loader_and_model(tmp_path: Path, shape: str) -> None:
    config = make_config(*SHAPES[shape])
    run = write_run(tmp_path / "run", config)
    convert(open_source(run), tmp_path / "megatron", "megatron", FileLayout())
    folder = tmp_path / "megatron/iter_0000000"
    tensors = {name.removeprefix("model."): tensor for name, tensor in make_tensors(config).items()}
    model = build_own_model(config, "cpu")
    model.load_state_dict(tensors)
    (logits, shown), = run_ranks(1, load, folder, config)
    torch.testing.assert_close(logits, model.logits(TOKENS), rtol=0, atol=1e-5)
    assert shown.keys() == tensors.keys()
    degree = {"ep": 2} if config.num_moe_layers else {"tp": 2}
    cut = config.model_copy(update={"parallel": config.parallel.model_copy(update=degree)})
    for rank, (_, shown) in enumerate(run_ranks(2, load, folder, cut)):
        for name, part in shown.items():
            assert torch.equal(part, part_of(tensors[name], part, rank)), name
