"""Every format and layout to every other, bit for bit; logits against transformers; what stays the same."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig
from typer.testing import CliRunner

import moescale
from moescale.cli import app
from moescale.config import Config
from moescale.convert.formats.native import native_weights
from moescale.convert.mapping.mapped import FileLayout, weights_of
from moescale.convert.mapping.table import NativeName
from moescale.convert.run import convert, open_source
from moescale.verify import megatron
from tests.support.models import DENSE, MIXED, make_config, make_tensors, write_run

STYLES = ("sequential", "grouped", "te_grouped")
FORMATS = {
    "moescale": ("moescale", FileLayout()), "hf": ("hf", FileLayout()), "hf fused": ("hf", FileLayout(style="fused")),
    "torch_dist": ("megatron", FileLayout()),
    "sequential": ("megatron", FileLayout(4, 2, 2, 2, "sequential")),
    "grouped": ("megatron", FileLayout(2, 2, 1, 1, "grouped")),
    "te_grouped": ("megatron", FileLayout(1, 1, 2, 1, "te_grouped")),
    "deepspeed": ("deepspeed", FileLayout(2, 2, 1, 2)),
}


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def weights(path: Path) -> dict[NativeName, torch.Tensor]:
    return dict(weights_of(open_source(path), moments=True))


def same(path: Path, config: Config) -> None:
    """Hold all weights to those that the model was made with, by names that do not come from a table."""
    native, found = make_tensors(config), weights(path)
    assert found.keys() == native_weights(config).keys()
    for name, tensor in found.items():
        whole = native[".".join(("model", *name.weight))]
        assert torch.equal(tensor, whole if name.expert is None else whole[name.expert]), name


def essence(config: Config) -> dict[str, Any]:
    """What of a run is the model, and is used: not what its training was."""
    model = config.model.model_dump(exclude={"pattern", "init", "z_loss_coefficient"})
    dense = config.num_moe_layers < config.model.num_layers
    unused = set() if dense else {"d_ff", "activation"}
    moe = config.moe.model_dump(exclude={"load_balance_coefficient", "balance_over"}) if config.num_moe_layers else {}
    return {**{key: value for key, value in model.items() if key not in unused}, "layers": config.model.layers, **moe}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """One model in every format. -> the folder with them, and its fingerprints"""
    folder = tmp_path_factory.mktemp("all")
    opened = open_source(write_run(folder / "run", make_config()))
    results = [convert(opened, folder / name, *FORMATS[name]) for name in FORMATS]
    assert all(result.fingerprints == results[0].fingerprints for result in results)
    return folder, dict(results[0].fingerprints)


RARE = ("hf fused", "grouped", "te_grouped")
PAIRS = [pytest.param(one, two, marks=pytest.mark.slow if (one in RARE or two in RARE) and "moescale" not in (one, two)
                      else ()) for one, two in itertools.product(FORMATS, FORMATS)]


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_every_pair_of_formats(tmp_path: Path, everything: tuple[Path, dict[str, str]], one: str, two: str) -> None:
    folder, fingerprints = everything
    assert convert(open_source(folder / one), tmp_path / "two", *FORMATS[two]).fingerprints == fingerprints
    same(tmp_path / "two", make_config())
    opened = open_source(tmp_path / "two")
    assert essence(opened.config) == essence(make_config())
    if FORMATS[two][0] == "megatron" and FORMATS[two][1].style:
        assert opened.layout == FORMATS[two][1]


@pytest.mark.slow
@pytest.mark.parametrize("style", [*STYLES, "deepspeed"])
def test_every_layout(tmp_path: Path, style: str) -> None:
    """Of ep 1, 2, 4, 8, tp 1, 2, pp 1, 2, etp 1, 2: with 24 experts, which 8 divides."""
    config = make_config(moe={"num_experts": 24})
    opened = open_source(write_run(tmp_path / "run", config))
    for ep, tp, pp, etp in itertools.product((1, 2, 4, 8), (1, 2), (1, 2), (1, 2)):
        if tp % etp or (style == "deepspeed" and pp > 1):
            continue
        layout = FileLayout(ep, tp, pp, etp, None if style == "deepspeed" else style)
        convert(opened, tmp_path / "there", "deepspeed" if style == "deepspeed" else "megatron", layout)
        same(tmp_path / "there", config)
        shutil.rmtree(tmp_path / "there")


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (DENSE, {}), "mixed": (MIXED, {}), "tied": ({"tied_embeddings": True}, {}),
    "multi-query": ({"num_kv_heads": 1}, {}), "all heads": ({"num_kv_heads": 4}, {}),
    "gelu": ({**DENSE, "activation": "gelu"}, {}),
    "shared": ({}, {"num_shared_experts": 2, "router": "sigmoid_bias", "num_expert_groups": 4}),
    "probabilities": ({}, {"normalize_weights": False, "top_k": 3}),
    "switch": ({}, {"router": "switch", "top_k": 1, "capacity_factor": 1.25, "eval_capacity_factor": 1.25}),
}
GOALS = {"hf": ("dense", "tied", "multi-query", "all heads"), "deepspeed": ("dense", "mixed", "tied", "gelu", "switch"),
         "megatron": tuple(SHAPES)}


@pytest.mark.parametrize(("to", "shape"), [(to, shape) for to, shapes in GOALS.items() for shape in shapes])
@pytest.mark.parametrize("cut", [False, True])
def test_every_shape_of_model(tmp_path: Path, to: str, shape: str, cut: bool) -> None:
    if cut and (to == "hf" or shape == "multi-query"):
        pytest.skip("is not cut")
    config = make_config(*SHAPES[shape])
    opened = open_source(write_run(tmp_path / "run", config))
    layout = FileLayout(2, 2, 2 if to == "megatron" else 1, 1) if cut else FileLayout()
    first = convert(opened, tmp_path / "there", to, layout)
    back = convert(open_source(tmp_path / "there"), tmp_path / "back", "moescale", FileLayout())
    assert first.fingerprints == back.fingerprints
    same(tmp_path / "back", config)
    assert essence(open_source(tmp_path / "back").config) == essence(config)


COMMON = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
          "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
PEERS = {
    "mixtral": MixtralConfig(**COMMON, num_local_experts=12, num_experts_per_tok=2, sliding_window=None),
    "mixtral with a window": MixtralConfig(**COMMON, num_local_experts=12, num_experts_per_tok=2, sliding_window=5),
    "mistral": MistralConfig(**COMMON, sliding_window=5), "llama": LlamaConfig(**COMMON, tie_word_embeddings=True),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", PEERS)
def test_logits_of_transformers(tmp_path: Path, name: str, fused: bool) -> None:
    if fused and "mixtral" not in name:
        pytest.skip("has no experts")
    torch.manual_seed(0)
    peer = AutoModelForCausalLM.from_config(PEERS[name]).eval()
    for parameter in peer.parameters():
        parameter.data.normal_(0, 0.15)
    peer.save_pretrained(tmp_path / "peer", save_original_format=not fused)
    tokens = torch.randint(264, (3, 30))
    with torch.no_grad():
        theirs = peer(tokens).logits
    convert(open_source(tmp_path / "peer"), tmp_path / "run", "moescale", FileLayout())
    torch.testing.assert_close(moescale.load(tmp_path / "run").logits(tokens), theirs, rtol=0, atol=1e-5)
    convert(open_source(tmp_path / "run"), tmp_path / "back", "hf", FileLayout())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in peer.state_dict().items()}
    published = load_file(tmp_path / "back/model.safetensors")
    if "mixtral" in name:
        assert published["model.layers.1.block_sparse_moe.experts.10.w2.weight"].shape == (32, 48)


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescale.convert.formats.hf.weights.LARGEST_FILE", 20_000)
    run = write_run(tmp_path / "run", make_config())
    convert(open_source(run), tmp_path / "hf", "hf", FileLayout())
    files = sorted(tmp_path.glob("hf/*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 25_000 for file in files)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())["weight_map"]
    assert {name: file.name for file in files for name in load_file(file)} == index
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    same(tmp_path / "hf", make_config())


def test_bfloat16_is_its_own_fingerprint_and_widens_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_config())
    wide = convert(open_source(run), tmp_path / "wide", "hf", FileLayout())
    narrow = convert(open_source(run), tmp_path / "narrow", "megatron", FileLayout(), torch.bfloat16)
    assert {stored.dtype for stored in open_source(tmp_path / "narrow").tensors.values()} == {torch.bfloat16}
    back = convert(open_source(tmp_path / "narrow"), tmp_path / "back", "moescale", FileLayout())
    assert wide.fingerprints != narrow.fingerprints == back.fingerprints
    tensors = make_tensors(make_config())
    norm = weights(tmp_path / "back")[NativeName(("norm", "weight"))]
    assert torch.equal(norm, tensors["model.norm.weight"].bfloat16().float())


def test_a_native_checkpoint_keeps_its_optimizer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_config(), optimizer=True)
    convert(open_source(run), tmp_path / "copy", "moescale", FileLayout())
    before, after = weights(run), weights(tmp_path / "copy")
    assert len(before) == 3 * len(native_weights(make_config()))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    result = convert(open_source(run), tmp_path / "hf", "hf", FileLayout())
    assert "optim.exp_avg.norm.weight" in result.left_out


def test_the_command(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_config())

    def call(*words: object) -> str:
        result = CliRunner().invoke(app, ["convert", *map(str, words)])
        assert result.exit_code == 0, result.output
        return result.output

    output = call(run, tmp_path / "hf", "--to", "hf", "--verify")
    assert "largest difference of the logits" in output
    assert "fingerprint of" in output
    ranks = ("--to", "megatron", "--ep", 2, "--tp", 2, "--pp", 2)
    call(tmp_path / "hf", tmp_path / "megatron", *ranks, "--verify")
    described = [json.loads(call("--inspect", tmp_path / name, "--json")) for name in ("run", "hf", "megatron")]
    assert described[0]["fingerprints"] == described[1]["fingerprints"] == described[2]["fingerprints"]
    assert described[2]["layout"] == {"ep": 2, "tp": 2, "pp": 2, "etp": 1, "style": "sequential"}
    assert described[0]["experts"] == 12
    assert "layer 1" in call("--inspect", tmp_path / "hf")


@pytest.mark.parametrize(("shape", "style"), [
    pytest.param(shape, style, marks=() if style is None or shape in ("shared", "mixed") else pytest.mark.slow)
    for shape in SHAPES for style in (None, *STYLES)])
def test_logits_by_megatrons_own_arguments(tmp_path: Path, shape: str, style: str | None) -> None:
    """Read once more, by themselves, from what was written for one rank and for several."""
    config = make_config(*SHAPES[shape])
    run, there = write_run(tmp_path / "run", config), tmp_path / "there"
    ranks = {"sequential": (2, 2, 2, 1), "grouped": (2, 2, 1, 2), "te_grouped": (1, 1, 2, 1)}
    layout = FileLayout(*ranks[style], style) if style and shape != "multi-query" else FileLayout(style=style)
    convert(open_source(run), there, "megatron", layout)
    tokens = torch.arange(80).view(2, 40) * 7 % 264
    theirs = megatron.logits(open_source(there), tokens)
    torch.testing.assert_close(theirs, moescale.load(run).logits(tokens), rtol=0, atol=1e-6)
