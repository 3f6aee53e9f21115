"""What DeepSpeed is told of a run, and what is refused before anything starts; without the package."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from moescale.config import Config, ConfigError, parse_config
from moescale.engine import packages
from moescale.engine.base import check_engine
from moescale.engine.deepspeed_settings import settings


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", lambda name: "0.19.8")


def make_config(ranks: int = 4, file: Path | None = None, **groups: dict[str, Any]) -> Config:
    run = {"engine": "deepspeed", **groups.pop("run", {}), **({} if file is None else {"deepspeed": str(file)})}
    data = {"global_batch": 16, "micro_batch": 2, **groups.pop("data", {})}
    return parse_config({"run": run, "data": data, **groups}, "test").for_world(ranks)


def write(folder: Path, said: object) -> Path:
    (folder / "ds.json").write_text(json.dumps(said))
    return folder / "ds.json"


def test_settings_of_a_run_and_of_a_file(tmp_path: Path) -> None:
    plain = settings(make_config())
    assert plain["zero_optimization"] == {"stage": 3}
    assert (plain["train_micro_batch_size_per_gpu"], plain["gradient_accumulation_steps"]) == (2, 2)
    assert plain["gradient_clipping"] == 1.0
    assert not plain["bf16"]["enabled"]
    file = write(tmp_path, {
        "train_batch_size": 16, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": "auto"}},
        "bf16": {"enabled": True}, "communication_data_type": "bf16",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}},
    })
    merged = settings(make_config(file=file, precision={"compute": "bfloat16"}))
    assert merged["zero_optimization"] == {
        "stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}}
    assert merged["bf16"]["enabled"]
    assert merged["communication_data_type"] == "bf16"
    assert "optimizer" not in merged, "ours is handed over"


@pytest.mark.parametrize(("said", "words"), [
    ({"gradient_clipping": 0.5}, "gradient_clipping=0.5, and optim.clip_norm=1.0"),
    ({"train_batch_size": 32}, "train_batch_size=32, and data.global_batch=16"),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op=sum, and this engine's=mean"),
    ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1, and .*=2"),
    ({"bf16": {"enabled": True}}, "bf16.enabled=true, and precision.compute=float32"),
    ({"fp16": {"enabled": True}}, "fp16.enabled=true, and precision.compute=float32"),
    ({"optimizer": {"type": "Lamb"}}, "optimizer.type=Lamb, and optim.name=adamw"),
    ({"optimizer": {"params": {"lr": 0.1}}}, r"optimizer.params.lr=0.1, and optim.lr=0.001"),
    ({"optimizer": {"params": {"betas": [0.9, 0.99]}}}, r"betas=\[0.9, 0.99\], and optim.betas=\[0.9, 0.95\]"),
    ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage=1, and run.zero_stage=2"),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=true, and run.zero_stage=2"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler, which was not shown to train alike"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights, which was not shown"),
    ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "device=nvme, whose state no checkpoint"),
    ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param, and the stage of ZeRO is 2: write 3"),
    ([1], "must hold a JSON object"),
], ids=str)
def test_contradictions_are_named(tmp_path: Path, said: object, words: str) -> None:
    config = make_config(file=write(tmp_path, said), run={"zero_stage": 2})
    with pytest.raises(ConfigError, match=words) as error:
        check_engine(config)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file: run\.deepspeed="):
        check_engine(make_config(file=tmp_path / "none.json"))
    (tmp_path / "odd.json").write_text("{,}")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        check_engine(make_config(file=tmp_path / "odd.json"))


@pytest.mark.parametrize(("ranks", "groups", "words"), [
    (4, {"parallel": {"tp": 2}}, "parallel.tp=2 does not run under run.engine=deepspeed.*write parallel.tp=1"),
    (4, {"parallel": {"pp": 2}}, "parallel.pp=2 does not run"),
    (4, {"parallel": {"dp_replicate": 2}}, "write parallel.dp_replicate=1"),
    (1, {}, "one was started: start 2 or more"), (2, {"optim": {"name": "adafactor"}}, "write optim.name=adamw"),
    (2, {"optim": {"moments": "bfloat16"}}, "optim.moments=bfloat16 .* write optim.moments=float32"),
    (2, {"precision": {"compute": "float64"}}, "write float32 or bfloat16"),
    (2, {"precision": {"reduce": "bfloat16"}}, "write precision.reduce=float32"),
    (2, {"parallel": {"compile": True}}, "write parallel.compile=false"),
    (2, {"parallel": {"row_budget": 1.5}}, "write parallel.row_budget=null"),
    (2, {"model": {"pattern": [{"mixer": "mamba"}]}}, "the mixer mamba was not shown .* write run.zero_stage=2"),
    (2, {"parallel": {"recompute": "selective"}}, "recompute=selective was not shown .* write run.zero_stage=2"),
], ids=str)
def test_what_it_cannot_do_is_refused(ranks: int, groups: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_engine(make_config(ranks, **groups))
    check_engine(make_config(ranks, **groups, run={"engine": "native"}))


def test_the_package_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", lambda name: "0.14.2")
    with pytest.raises(ConfigError, match=r"tested with deepspeed 0\.19\.8, and 0\.14\.2 is installed: pip install"):
        check_engine(make_config())

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packages, "version", missing)
    with pytest.raises(ConfigError, match=r"needs the package deepspeed: pip install .*, or write run\.engine=native"):
        check_engine(make_config())
