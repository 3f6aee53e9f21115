"""Which files of a folder are the model: as transformers takes them, or a refusal that says why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moescale.cli import app
from moescale.convert.formats.hf.folder import INDEX, SINGLE
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.run import convert, open_source
from tests.support.models import DENSE, make_config, write_run


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    run = write_run(folder / "run", make_config({**DENSE, "window": None}))
    convert(open_source(run), folder / "hf", "hf", FileLayout())
    return folder / "hf"


@pytest.fixture
def source(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "source")


def call(source: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["convert", str(source), str(source.parent / "there"), "--to", "moescale"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, " ".join(result.output.split())


def fingerprint(path: Path) -> str:
    return json.loads(CliRunner().invoke(app, ["convert", "--inspect", str(path), "--json"]).output)[
        "fingerprints"]["model"]


def add(source: Path, name: str) -> None:
    save_file({"other.weight": torch.zeros(4, 4)}, source / name)


def test_the_one_file_comes_before_an_index_of_older_ones(source: Path, published: Path) -> None:
    """Shards of an older state and their index lie beside it; so does what is no model of this format."""
    older = {name: tensor + 1 for name, tensor in load_file(source / SINGLE).items()}
    save_file(older, source / "model-00001-of-00001.safetensors")
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(older, "model-00001-of-00001.safetensors")}))
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        add(source, name)
    (source / "adapter_config.json").write_text("{}")
    code, said = call(source)
    assert code == 0, said
    assert fingerprint(source.parent / "there") == fingerprint(published)
    for word in (INDEX, "consolidated.safetensors", "an adapter lies beside"):
        assert word in said


def test_an_index_counts_without_the_one_file_and_names_what_it_lacks(source: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    (source / SINGLE).rename(source / shard)
    add(source, "value_head.safetensors")
    names = [*load_file(source / shard), "model.layers.0.self_attn.rotary_emb.inv_freq"]
    (source / INDEX).write_text("\ufeff" + json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    code, said = call(source)
    assert code == 0, said
    assert "value_head.safetensors" in said


def only(name: str, content: bytes = b"1234") -> Callable[[Path], None]:
    def change(source: Path) -> None:
        (source / SINGLE).unlink()
        (source / name).write_bytes(content)

    return change


def renamed(prefix: str, without: str = "") -> Callable[[Path], None]:
    def change(source: Path) -> None:
        tensors = load_file(source / SINGLE)
        save_file({prefix + name.removeprefix(without): tensor for name, tensor in tensors.items()}, source / SINGLE)

    return change


def of_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        tensors = load_file(source / SINGLE)
        save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].to(dtype)}, source / SINGLE)

    return change


def head_of_a_classifier(source: Path) -> None:
    tensors = load_file(source / SINGLE)
    tensors["score.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, source / SINGLE)


def own_code(source: Path) -> None:
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "auto_map": {"AutoModel": "own.Own"}}))


def unheard_of(source: Path) -> None:
    data = (source / SINGLE).read_bytes()
    (source / SINGLE).write_bytes(data.replace(b'"F32"', b'"F7X"', 1))


@pytest.mark.parametrize(("change", "words"), [
    (only("consolidated.safetensors"), "consolidated.safetensors"), (only("adapter_model.safetensors"), "adapter"),
    (only("pytorch_model.bin"), "pytorch_model.bin, a pickle"), (only("model.gguf"), "llama.cpp"),
    (only("vocab.txt"), "no model.safetensors"), (only(SINGLE, b""), "no safetensors file"),
    (only(SINGLE, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14\n"), "git lfs pull"),
    (lambda source: (source / "config.json").unlink(), "no config.json"),
    (lambda source: (source / "config.json").write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    (renamed("_orig_mod."), "_orig_mod."), (renamed("module."), "module."), (renamed("base_model.model."), "peft"),
    (renamed("", "model."), "prefix model."), (of_dtype(torch.float8_e4m3fn), "float8_e4m3fn"),
    (own_code, "code of its own"), (head_of_a_classifier, "score.weight"),
    (of_dtype(torch.int16), "int16"), (unheard_of, "F7X"),
])
def test_what_is_no_model_is_refused_with_the_true_reason(
    source: Path, change: Callable[[Path], None], words: str
) -> None:
    change(source)
    code, said = call(source)
    assert code == 2
    assert words in said
    assert "damaged" not in said or words == "no safetensors file"
    assert not (source.parent / "there").exists()


def test_links_of_the_hugging_face_cache_and_no_others(source: Path, published: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--some--model"
    snapshot = cache / "snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, cache / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(os.path.relpath(cache / "blobs" / f"{number:040x}", snapshot))
    assert fingerprint(snapshot) == fingerprint(published)
    code, said = call(cache)
    assert code == 2
    assert "snapshots/0123abcd" in said
    shutil.copytree(snapshot, cache / "snapshots/ffff", symlinks=True)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123abcd")
    assert "snapshots/0123abcd" in call(cache)[1]
    shutil.move(cache / "blobs", tmp_path / "outside")
    (cache / "blobs").mkdir()
    for file in snapshot.iterdir():
        target = tmp_path / "outside" / Path(os.readlink(file)).name
        file.unlink()
        file.symlink_to(target)
    code, said = call(snapshot)
    assert code == 2
    assert "leads out of it" in said


def test_a_name_of_the_hub_is_no_folder(tmp_path: Path) -> None:
    code, said = call(Path("mistralai/Mixtral-8x7B-v0.1"))
    assert code == 2
    assert "download" in said
