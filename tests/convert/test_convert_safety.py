"""What is damaged, malicious or wrong is one line and leaves nothing; a kill leaves nothing or the whole."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moescale.cli import app
from moescale.config import ConfigError
from moescale.convert import copying
from moescale.convert.formats.hf import mixtral
from moescale.convert.formats.hf.folder import INDEX
from moescale.convert.mapping.mapped import FileLayout, weights_of
from moescale.convert.mapping.table import NativeName, Row
from moescale.convert.run import convert, open_source
from moescale.verify.conversion import compare_models
from tests.support.models import DENSE, make_config, write_run

Native = tuple[str, ...]  # the name of a weight
FILE = "model.safetensors"
EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w{}.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    convert(open_source(write_run(folder / "run", make_config())), folder / "hf", "hf", FileLayout())
    return folder / "hf"


@pytest.fixture
def source(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "source")


def refused(source: Path, *words: str, to: tuple[str, ...] = ("--to", "moescale")) -> None:
    """Try, and see one line and nothing at the destination."""
    there = source.parent / "there"
    result = CliRunner().invoke(app, ["convert", str(source), str(there), *to])
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("moescale: ")]
    assert len(lines) == 1, result.output
    for word in words:
        assert word in lines[0]
    assert not there.exists()
    assert not there.with_name("there.partial").exists()


def change(source: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / FILE)
    edit(tensors)
    save_file(tensors, source / FILE, {"format": "pt"})


def test_a_tensor_missing(source: Path) -> None:
    change(source, lambda tensors: tensors.pop(EXPERT.format(10, 2)))
    refused(source, EXPERT.format(10, 2), "missing")


def test_a_tensor_too_many(source: Path) -> None:
    change(source, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    refused(source, "self_attn.q_proj.bias is not used")


def test_a_tensor_twice(source: Path) -> None:
    """In two files, and, as a header that lies, twice in one place."""
    tensors = load_file(source / FILE)
    first, second = (source / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    shutil.copy(source / FILE, first)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, second)
    (source / FILE).rename(source.parent / FILE)
    refused(source, "model.norm.weight twice")
    first.unlink()
    second.unlink()
    (source.parent / FILE).rename(source / FILE)
    data = (source / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[EXPERT.format(3, 1)]["data_offsets"] = header[EXPERT.format(4, 1)]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    (source / FILE).write_bytes(data[:8] + text + data[8 + length :])
    refused(source, "two of its tensors lie in one place")


def test_another_shape(source: Path) -> None:
    change(source, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(24)}))
    refused(source, "model.norm.weight has shape [24], but its configuration makes it [16]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number(source: Path, value: float) -> None:
    change(source, lambda tensors: tensors[EXPERT.format(10, 3)][0].__setitem__(5, value))
    refused(source, "blocks.1.channel_mixer.experts.up.10", "no finite numbers")


def test_a_truncated_shard(source: Path) -> None:
    os.truncate(source / FILE, (source / FILE).stat().st_size - 100)
    refused(source, "damaged", FILE, "its header describes")
    (source / FILE).write_bytes(b"\xff" * 64)
    refused(source, FILE, "is no safetensors file")


def test_an_index_that_leads_astray(source: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    (source / FILE).rename(source / shard)

    def index(**names: str) -> None:
        (source / INDEX).write_text(json.dumps({"weight_map": {
            **dict.fromkeys(load_file(source / shard), shard), **names}}))

    index(**{"model.norm.weight": "gone.safetensors"})
    refused(source, "gone.safetensors is missing")
    shutil.copy(source / shard, source.parent / "outside.safetensors")
    index(**{"model.norm.weight": "../outside.safetensors"})
    refused(source, "'../outside.safetensors', which leads out of it")
    (source / "link.safetensors").symlink_to(source.parent / "outside.safetensors")
    index(**{"model.norm.weight": "link.safetensors"})
    refused(source, "'link.safetensors', which leads out of it")
    index(**{"ghost.weight": shard})
    refused(source, "ghost.weight is missing")


class Harm:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(("to", "file"), [
    ("megatron", "iter_0000000/common.pt"), ("deepspeed", "global_step0/layer_0_expert_10_mp_rank_00_model_states.pt"),
    ("deepspeed", "global_step0/mp_rank_00_model_states.pt"), ("megatron", "iter_0000000/.metadata"),
])
def test_a_malicious_pickle(published: Path, tmp_path: Path, to: str, file: str) -> None:
    source = tmp_path / "source"
    convert(open_source(published), source, to, FileLayout())
    harm = Harm(tmp_path / "harm")
    if file.endswith(".metadata"):
        (source / file).write_bytes(pickle.dumps(harm))
    else:
        torch.save({"args": harm, "module": harm}, source / file)
    refused(source, "posix.mkdir", "not loaded", to=("--to", "hf"))
    assert not (tmp_path / "harm").exists()


def test_copies_that_differ(published: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    convert(open_source(published), source, "megatron", FileLayout(tp=2))
    file = source / "iter_0000000/mp_rank_01/model_optim_rng.pt"
    from argparse import Namespace

    with torch.serialization.safe_globals([Namespace]):
        values = torch.load(file)
    values["model"]["decoder.final_layernorm.weight"][3] += 1
    torch.save(values, file)
    refused(source, "decoder.final_layernorm.weight in mp_rank_01 is no copy")


@pytest.mark.parametrize(("model", "moe", "words"), [
    ({"block": "parallel"}, {}, "model.block=parallel"), ({"norm": "layernorm"}, {}, "model.norm=layernorm"),
    ({"positions": "alibi"}, {}, "attention.positions=alibi"),
    ({**DENSE, "activation": "relu"}, {}, "feed_forward.activation=relu"),
    ({"pattern": [{"channel_mixer": "feed_forward"}, {}]}, {}, "attention.positions=rope"),
    ({}, {"router": "switch", "top_k": 1}, "moe.router=switch"),
    ({}, {"num_shared_experts": 1}, "moe.num_shared_experts=1"),
], ids=str)
def test_what_hugging_face_cannot_express(tmp_path: Path, model: dict, moe: dict, words: str) -> None:
    refused(write_run(tmp_path / "run", make_config(model, moe)), words, "cannot be expressed", to=("--to", "hf"))


def test_what_is_there_stays(source: Path) -> None:
    there = source.parent / "there"
    there.mkdir()
    (there / "mine").write_text("1")
    result = CliRunner().invoke(app, ["convert", str(source), str(there), "--to", "moescale"])
    assert result.exit_code == 2
    assert "exists already" in result.output
    assert [path.name for path in there.iterdir()] == ["mine"]


def test_a_folder_beside_the_destination_stays(source: Path) -> None:
    """A conversion is filled in DESTINATION.partial; one that somebody else made is not touched."""
    mine = source.parent / "there.partial"
    mine.mkdir()
    (mine / "config.yaml").write_text("mine")
    result = CliRunner().invoke(app, ["convert", str(source), str(source.parent / "there"), "--to", "moescale"])
    assert result.exit_code == 2
    assert "there.partial is in the way" in result.output
    assert [path.read_text() for path in mine.iterdir()] == ["mine"]
    (mine / "config.yaml").unlink()
    result = CliRunner().invoke(app, ["convert", str(source), str(source.parent / "there"), "--to", "moescale"])
    assert result.exit_code == 0, "an empty one holds nothing that could be lost"
    assert not mine.exists()


@pytest.mark.parametrize(("keys", "named"), [
    ({"pattern": [{"channel_mixer": "feed_forward"}, {"channel_mixer": "feed_forward", "attention": {"window": 3}}]},
     r"model\.pattern\.1\.attention\.window=3"),
    ({"block_size": 4}, r"attention\.block_size=4"), ({"window": 3, "dilation": 2}, r"attention\.dilation=2"),
    ({"window": 3, "stride": 4}, r"attention\.stride=4"), ({"window": 3, "global_tokens": 1}, "global_tokens=1")])
@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_what_no_foreign_format_can_say_is_not_lost(tmp_path: Path, to: str, keys: dict, named: str) -> None:
    opened = open_source(write_run(tmp_path / "run", make_config(keys)))
    with pytest.raises(ConfigError, match=rf"{named}.*--to moescale"):
        convert(opened, tmp_path / "there", to, FileLayout())
    assert not (tmp_path / "there").exists()


def exchanged(rows: Mapping[Native, Row], one: Native, two: Native) -> dict[Native, Row]:
    return {**rows, one: Row(one, rows[two].foreign, rows[one].transforms),
            two: Row(two, rows[one].foreign, rows[two].transforms)}


class Swapped(str):
    """A name that takes expert 3 for 10, and 10 for 3."""

    def format(self, *, layer: int, expert: int) -> str:  # type: ignore[override]
        return str.format(self, layer=layer, expert={3: 10, 10: 3}.get(expert, expert))


@pytest.mark.parametrize("fault", ["gate and up", "two experts", "order of heads", "a row of the router"])
def test_a_wrong_mapping_does_not_land(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The table is broken for writing and for reading back alike: only the other side's own code can tell."""
    opened = open_source(write_run(tmp_path / "run", make_config({"num_layers": 1, "window": None})))
    table, experts = mixtral.EXPERTS["published"], (*mixtral.MIXTURE.split(".")[:-1], "experts")
    if fault == "gate and up":
        rows = exchanged(table, (*experts, "gate"), (*experts, "up"))
        monkeypatch.setitem(mixtral.EXPERTS, "published", rows)
    elif fault == "two experts":
        rows = {name: Row(name, Swapped(row.foreign), row.transforms) for name, row in table.items()}
        monkeypatch.setitem(mixtral.EXPERTS, "published", rows)
    else:
        real = copying.write_region

        def wrong(stored: Any, place: Any, values: torch.Tensor) -> None:
            if fault == "order of heads" and values.shape == (32, 16):
                values = values.view(4, 8, 16).flip(0).reshape(32, 16)
            elif fault == "a row of the router" and values.shape == (12, 16):
                values = values.roll(1, 0)
            real(stored, place, values)

        monkeypatch.setattr(copying, "write_region", wrong)
    with pytest.raises(ConfigError, match=r"--verify: .* nothing was written"):
        convert(opened, tmp_path / "there", "hf", FileLayout(), check=compare_models)
    assert not (tmp_path / "there").exists()


def _forked(work: Callable[[], object]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


def test_a_kill_at_ten_moments_leaves_nothing_or_the_whole(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same conversion goes on from there, without doing again what was done."""
    draw, there, real = random.Random(0), tmp_path / "there", copying.write_region
    writes, last = itertools.count(1), math.inf

    def write(*args: Any) -> None:
        if next(writes) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)

    monkeypatch.setattr(copying, "write_region", write)
    whole = convert(open_source(published), tmp_path / "whole", "megatron", FileLayout(tp=2))
    number, seen = next(writes), set()
    for _ in range(10):
        writes, last = itertools.count(1), draw.randint(1, 2 * number)  # half of them come too late
        process = _forked(lambda: convert(open_source(published), there, "megatron", FileLayout(tp=2)))
        process.join(20)
        seen.add(there.exists())
        if there.exists():
            assert dict(weights_of(open_source(there))).keys() == dict(weights_of(open_source(published))).keys()
            shutil.rmtree(there)
    last = math.inf
    assert seen == {False, True}, "some are killed, and others get to the end"
    assert convert(open_source(published), there, "megatron", FileLayout(tp=2)).fingerprints == whole.fingerprints
    assert not there.with_name("there.partial").exists()


def test_what_was_done_is_not_done_again(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(open_source(published), tmp_path / "whole", "moescale", FileLayout())
    real, left = copying.read_weight, iter(range(3, -1, -1))
    done: list[NativeName] = []

    def stops(opened: Any, pieces: Any, name: NativeName) -> torch.Tensor:
        if next(left, 0) == 0:
            raise KeyboardInterrupt
        done.append(name)
        return real(opened, pieces, name)

    monkeypatch.setattr(copying, "has_rows", lambda weight: True)  # none goes across row by row
    monkeypatch.setattr(copying, "THREADS", 1)
    monkeypatch.setattr(copying, "read_weight", stops)
    with pytest.raises(KeyboardInterrupt):
        convert(open_source(published), tmp_path / "there", "moescale", FileLayout())
    assert not (tmp_path / "there").exists()
    again: list[NativeName] = []
    monkeypatch.setattr(copying, "read_weight", lambda opened, pieces, name: (again.append(name),
                                                                               real(opened, pieces, name))[1])
    result = convert(open_source(published), tmp_path / "there", "moescale", FileLayout())
    assert done
    assert not set(done) & set(again)
    assert result.fingerprints == whole.fingerprints
    assert all(torch.equal(one, two) for (_, one), (_, two) in zip(
        weights_of(open_source(tmp_path / "there")), weights_of(open_source(tmp_path / "whole")), strict=True))
