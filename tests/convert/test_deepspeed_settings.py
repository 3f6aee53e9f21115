"""What a DeepSpeed checkpoint says of itself: its settings change nothing, or are refused; its logits by themselves."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moescale
from moescale.config import ConfigError
from moescale.convert.formats import deepspeed as deepspeed_files
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.mapping.table import Row
from moescale.convert.run import convert, open_source
from moescale.verify import deepspeed
from moescale.verify.conversion import compare_models
from tests.support.models import DENSE, MIXED, make_config, write_run

TOKENS = torch.arange(80).view(2, 40) * 7 % 264
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": ({}, {"top_k": 3}), "mixed": ({**MIXED, "tied_embeddings": True}, {"num_shared_experts": 1}),
    "switch": ({"norm": "layernorm"}, {"router": "switch", "top_k": 1}), "gshard": ({}, {"router": "gshard"}),
    "palm": ({**DENSE, "block": "parallel", "positions": "alibi", "scale_logits": True, "num_heads": 6,
              "num_kv_heads": 2, "activation": "geglu"}, {}),
    "no positions": ({**DENSE, "positions": "none", "activation": "relu"}, {}),
}


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def written(folder: Path, shape: str = "mixtral", layout: FileLayout | None = None) -> Path:
    run = write_run(folder / "run", make_config(*SHAPES[shape]))
    convert(open_source(run), folder / "there", "deepspeed", layout or FileLayout())
    return folder / "there"


def changed(there: Path, **values: Any) -> Path:
    file = there / "global_step0/mp_rank_00_model_states.pt"
    torch.save({**torch.load(file), **values}, file)
    return there


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_by_its_own_names(tmp_path: Path, shape: str) -> None:
    whole, cut = written(tmp_path / "one", shape), written(tmp_path / "two", shape, FileLayout(tp=2, etp=2))
    ours = moescale.load(tmp_path / "one/run").logits(TOKENS)
    for there in (whole, cut):
        torch.testing.assert_close(deepspeed.logits(open_source(there), TOKENS), ours, rtol=0, atol=1e-6)


def test_a_wrong_table_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(found: Row) -> Row:
        other = {"gate": "up", "up": "gate"}
        return replace(found, native=tuple(other.get(part, part) for part in found.native))

    there = written(tmp_path)
    monkeypatch.setattr(deepspeed_files, "EXPERTS", tuple(exchanged(found) for found in deepspeed_files.EXPERTS))
    with pytest.raises(ConfigError, match="--verify: largest difference"):
        convert(open_source(there), tmp_path / "back", "moescale", FileLayout(), check=compare_models)


def test_settings_of_training_change_nothing(tmp_path: Path) -> None:
    there = written(tmp_path)
    before = open_source(there).config
    changed(there, num_experts=[12, 12], args=Namespace(rotary_percent=1.0, deepspeed=True), ds_config={
        "train_batch_size": 8, "zero_optimization": {"stage": 1}, "fp16": {"enabled": True}, "sparse_attention": {},
        "progressive_layer_drop": {"enabled": False, "theta": 0.5}, "weight_quantization": None,
    })
    assert open_source(there).config == before


@pytest.mark.parametrize(("values", "words"), [
    ({"ds_config": {"sparse_attention": {"mode": "fixed"}}}, "sparse_attention"),
    ({"ds_config": {"progressive_layer_drop": {"enabled": True}}}, "progressive_layer_drop"),
    ({"ds_config": {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}}},
     "compression_training"),
    ({"ds_config": {"softcap": 30.0}}, "softcap=30.0"), ({"num_experts": [16, 16]}, "num_experts"),
    ({"args": Namespace(rotary_percent=0.5)}, "rotary_percent=0.5"),
], ids=str)
def test_settings_that_may_change_the_model_are_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    there = changed(written(tmp_path), **values)
    with pytest.raises(ConfigError, match=words) as error:
        open_source(there)
    assert "\n" not in str(error.value)


def test_the_weight_of_one_expert(tmp_path: Path) -> None:
    """1 here; there its share of all experts' probability."""
    run = write_run(tmp_path / "run", make_config({}, {"top_k": 1}))
    with pytest.raises(ConfigError, match=r"moe\.top_k=1"):
        convert(open_source(run), tmp_path / "there", "deepspeed", FileLayout())
