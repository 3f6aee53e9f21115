"""Small models for tests of conversions: 12 experts, as 10 sorts wrong as a word, and every weight another number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moescale.checkpoint.store import save_checkpoint
from moescale.config import Config, parse_config
from moescale.model.build import build_model
from tests.support.groups import in_groups

MODEL = {
    "vocab_size": 264, "d_model": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 32,
    "rope_theta": 1e6, "window": 7,
}
MOE = {"num_experts": 12, "top_k": 2, "d_ff": 24}
DENSE = {"pattern": [{"channel_mixer": "feed_forward"}]}
MIXED = {"pattern": [{"channel_mixer": "feed_forward"}, {"channel_mixer": "moe"}], "window": None}


def make_config(
    model: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **data: Any
) -> Config:
    return parse_config({**in_groups({**MODEL, **(model or {})}), "moe": {**MOE, **(moe or {})},
                         "data": {"seq_len": 64, **data}}, "test")


def make_tensors(config: Config, optimizer: bool = False, std: float = 0.2) -> dict[str, Tensor]:
    """Draw weights, with optimizer state if asked for; no two numbers are equal. -> by their names in a checkpoint"""
    generator = torch.Generator().manual_seed(0)
    model = build_model(config, "cpu")
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if optimizer:
        tensors |= {f"optim.{key}.{name}": torch.empty_like(parameter.data)
                    for name, parameter in model.named_parameters() for key in ("exp_avg", "exp_avg_sq")}
    return {name: torch.randn(tensor.shape, generator=generator) * std for name, tensor in tensors.items()}


def write_run(run_dir: Path, config: Config, *, optimizer: bool = False, std: float = 0.2) -> Path:
    """Write a run directory with one checkpoint, as training would. -> it"""
    tensors = make_tensors(config, optimizer, std)
    save_checkpoint(run_dir, 0, tensors, {"seed": 0}, {"config.yaml": config.to_yaml()}, keep=1)
    return run_dir
