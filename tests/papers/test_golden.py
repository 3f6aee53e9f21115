"""The configurations that ship, shrunk: how many weights they have and what loss they start with, as recorded.

A change of any formula, name or first value shows here. Where it was meant, write the new number, and say why.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moescale.config import load_config
from moescale.model.build import build_model
from moescale.model.initialize import initialize
from moescale.planner.count import count_parameters
from moescale.spec.model import describe
from moescale.verify.candidates import Layout
from moescale.verify.shrink import shrink

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = {  # parameters, nats a target, balance loss a token and layer of experts
    "attention_patterns": (84448, 4.67355878, 1.19865306),
    "gshard_600b": (16800, 4.15770312, 1.00420961),
    "hippo_small": (29984, 4.66808370, 1.08881655),
    "jamba_52b": (124461, 4.17598192, 1.00812323),
    "lmu_small": (30048, 4.72185243, 1.09695403),
    "lssl_small": (31776, 4.73034747, 1.12496712),
    "mamba_130m": (17376, 4.15921178, 0.0),
    "mixtral_8x22b": (35488, 4.17194974, 1.01169787),
    "mixtral_8x7b": (35488, 4.17194974, 1.01169787),
    "palm_540b": (11360, 4.88576923, 0.0),
    "palm_8b": (11360, 4.88576923, 0.0),
    "quickstart": (35488, 4.71472944, 1.16607873),
    "s4_small": (34592, 4.67103913, 1.10386851),
    "switch_base": (15648, 5.78687526, 1.01242643),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shrunk_configuration_keeps_its_weights_and_first_loss(path: Path) -> None:
    config = shrink(load_config(path), [Layout()])
    config = config.model_copy(update={"precision": config.precision.model_copy(update={"compute": "float64"})})
    model = build_model(config, "cpu").train()
    initialize(model, describe(config), seed=0)
    tokens = torch.randint(0, config.model.vocab_size, (4, 25), generator=torch.Generator().manual_seed(0))
    sums = model(tokens[:, :-1], targets=tokens[:, 1:], positions=torch.arange(24).expand(4, 24),
                 token_id=torch.arange(96).view(4, 24))
    parameters, loss, balance = GOLDEN[path.stem]
    assert count_parameters(config).total == sum(each.numel() for each in model.parameters()) == parameters
    assert sums[0].item() / 96 == pytest.approx(loss, rel=1e-6)
    assert sums[2].item() / 96 == pytest.approx(balance * config.num_moe_layers, rel=1e-6)
