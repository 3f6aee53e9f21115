"""DeepSpeed's own loader takes what was written, and what DeepSpeed writes is read, ZeRO's partitions too."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moescale.convert.formats.deepspeed import open_checkpoint
from moescale.convert.mapping.mapped import FileLayout, weights_of
from moescale.convert.run import convert, open_source
from moescale.layers.feed_forward import FeedForward
from moescale.model.build import build_model
from moescale.parallel.ranks import run_ranks
from tests.support.models import DENSE, make_config, make_tensors, write_run

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
              pytest.mark.slow]


def start() -> None:
    import deepspeed

    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # it would be compiled here, for minutes
    deepspeed.init_distributed("gloo", verbose=False)


def engine_of(model: nn.Module, stage: int = 0, *, parameters: Any = None, half: bool = False) -> Any:
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
                                "bf16": {"enabled": half}}
    if stage:
        settings["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    return deepspeed.initialize(model=model, model_parameters=parameters or model.parameters(), config=settings)[0]


def model_with_its_experts(ep: int) -> nn.Module:
    """Make our model with its mixtures of experts."""
    from deepspeed.moe.layer import MoE

    model = build_model(make_config(), "cpu")
    for block in model.blocks.values():
        expert = FeedForward(16, 24, "swiglu")
        block.channel_mixer = MoE(16, expert, num_experts=12, ep_size=ep, k=2)
    return model


def load_experts(folder: Path, ep: int) -> dict[str, Tensor]:
    """Let DeepSpeed load our model with its mixtures of experts. -> what this rank then holds"""
    start()
    engine = engine_of(model_with_its_experts(ep))
    assert engine.load_checkpoint(str(folder), load_module_only=True)[0] is not None
    return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}


@pytest.mark.parametrize("ep", [1, 2])
def test_its_loader_takes_what_was_written(tmp_path: Path, ep: int) -> None:
    run = write_run(tmp_path / "run", make_config())
    convert(open_source(run), tmp_path / "deepspeed", "deepspeed", FileLayout())
    native = make_tensors(make_config())
    for rank, held in enumerate(run_ranks(ep, load_experts, tmp_path / "deepspeed", ep)):
        for name, tensor in held.items():
            head, middle, end = name.partition(".deepspeed_moe.")
            if end.startswith("experts."):
                index, part = end.removeprefix("experts.deepspeed_experts.").split(".")[:2]
                ours = native[f"model.{head}.experts.{part}"][rank * 12 // ep + int(index)]
            else:
                ours = native[f"model.{head}.router.weight" if middle else f"model.{name}"]
            assert torch.equal(tensor, ours), name


def save_experts(folder: Path, ep: int, stage: int, half: bool) -> dict[str, Tensor]:
    """Take a step of our model with its mixtures of experts, and save. -> the float32 weights of this rank"""
    start()
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.utils import safe_get_full_fp32_param

    model = model_with_its_experts(ep)
    torch.manual_seed(dist.get_rank() % ep)  # companions hold the same
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    engine = engine_of(model, stage, parameters=groups, half=half)
    engine.backward(torch.stack([parameter.float().square().sum() for parameter in engine.module.parameters()]).sum())
    engine.step()
    engine.save_checkpoint(str(folder))
    if dist.get_rank() == 0:
        (folder / "config.yaml").write_text(make_config().to_yaml())
    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in engine.module.named_parameters()}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("ranks", "ep", "stage"), [(2, 1, 1), (2, 2, 2), (4, 2, 1), (4, 2, 2)])
def test_partitions_of_its_experts_are_gathered(tmp_path: Path, ranks: int, ep: int, stage: int, half: bool) -> None:
    folder = tmp_path / "zero"
    folder.mkdir()
    held = run_ranks(ranks, save_experts, folder, ep, stage, half)
    moments = set()
    for native, tensor in weights_of(open_checkpoint(folder), moments=True):
        *head, part = native.weight
        if native.moment is not None:
            moments.add(native.moment)
        elif native.expert is not None:
            local, mixture = 12 // ep, ".".join(head[:-1])
            name = f"{mixture}.deepspeed_moe.experts.deepspeed_experts.{native.expert % local}.{part}.weight"
            assert torch.equal(tensor, held[native.expert // local][name]), native
        else:
            name = ".".join(native.weight).replace("router.weight", "deepspeed_moe.gate.wg.weight")
            assert torch.equal(tensor, held[0][name]), native
    assert moments == {"exp_avg", "exp_avg_sq"}


def save_zero(folder: Path, stage: int) -> None:
    start()
    config = make_config(DENSE)
    model = build_model(config, "cpu")
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in make_tensors(config).items()})
    engine_of(model, stage).save_checkpoint(str(folder))
    if dist.get_rank() == 0:
        (folder / "config.yaml").write_text(config.to_yaml())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_partitions_are_gathered(tmp_path: Path, stage: int) -> None:
    folder = tmp_path / "zero"
    folder.mkdir()
    run_ranks(2, save_zero, folder, stage)
    native = make_tensors(make_config(DENSE))
    found = dict(weights_of(open_checkpoint(folder)))
    assert {f"model.{name}" for name in found} == native.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, native[f"model.{name}"]), name
