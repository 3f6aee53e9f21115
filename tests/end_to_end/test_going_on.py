"""A run that goes on with something changed: refused, or said, and what the figures mean stays true."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import moescale
from moescale.checkpoint import store
from moescale.cli import app
from moescale.config import Config
from moescale.config.changes import decides_text, is_harmless
from moescale.data import batches
from tests.support.groups import in_groups
from tests.support.runs import MEASURED

STEPS, BATCH, SEQ = 6, 4, 16
WORDS = ("ba", "do", "ki", "lu", "me", "no", "pa", "ri", "so", "tu")


def write_text(folder: Path, seed: int) -> Path:
    folder.mkdir()
    draw = random.Random(seed)
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(60)))
    return folder


def write_tokenizer(path: Path, seed: int) -> Path:
    letters = [*WORDS, *map(chr, range(32, 127))]
    random.Random(seed).shuffle(letters)
    vocabulary = {"<s>": 0, **{letter: number for number, letter in enumerate(letters, 1)}}
    path.write_text(json.dumps({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<s>"},
    }))
    return path


@dataclass(frozen=True)
class Started:
    """A folder with a text, a configuration and a run of six steps in `run`."""

    folder: Path

    def train(self, *overrides: str, config: str = "tiny.yaml") -> tuple[int, str]:
        result = CliRunner().invoke(app, ["train", config, *overrides])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, " ".join(result.output.split())

    def go_on(self, *overrides: str) -> list[dict]:
        """Go on to step 8. -> the new lines of metrics.jsonl"""
        status, said = self.train("run.steps=8", *overrides)
        assert status == 0, said
        return self.lines()[STEPS:]

    def refused(self, *overrides: str) -> str:
        before = {path: path.read_bytes() for path in (self.folder / "run").rglob("*") if path.is_file()}
        status, said = self.train("run.steps=8", *overrides)
        assert status == 2, said
        assert said.count("moescale: ") == 1
        assert {path: path.read_bytes() for path in (self.folder / "run").rglob("*") if path.is_file()} == before
        return said

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "run/metrics.jsonl").read_text().splitlines()]

    def state(self, step: int) -> dict:
        return json.loads((self.folder / f"run/checkpoints/step_{step:08d}/checkpoint.json").read_text())["state"]


def begin(folder: Path, **groups: dict) -> Started:
    """Train the first six steps in a new folder."""
    write_text(folder / "text", seed=0)
    values = {
        "run": {"dir": "run", "steps": STEPS},
        "data": {"files": ["text/*.txt"], "cache_dir": "cache", "seq_len": SEQ, "global_batch": BATCH, "held_out": 0.1},
        **in_groups({"vocab_size": 264, "d_model": 16, "num_layers": 2,
                     "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}),
        "moe": {"num_experts": 4, "top_k": 2, "d_ff": 16}, "optim": {"lr": 0.01},
        "checkpoint": {"every": 3}, "monitor": {"every": 1, "moved_every": None, "eval_sequences": 2},
    }
    for group, keys in groups.items():
        values[group].update(keys)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    started, here = Started(folder), Path.cwd()
    os.chdir(folder)
    try:
        status, said = started.train()
    finally:
        os.chdir(here)
    assert status == 0, said
    return started


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Started:
    return begin(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Started:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder / "tok.json", 0)
    return begin(folder, data={"tokenizer": str(folder / "tok.json")})


def copied(origin: Started, place: Path) -> Started:
    shutil.copytree(origin.folder, place)
    return Started(place)


@pytest.fixture
def run(origin: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    """A copy of the run, its folder the working directory."""
    started = copied(origin, tmp_path / "here")
    monkeypatch.chdir(started.folder)
    return started


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of the training sequences that are read, in their order."""
    seen: list[int] = []
    read = batches.Batches._sequence
    monkeypatch.setattr(batches.Batches, "_sequence", lambda self, number: seen.append(number) or read(self, number))
    return seen


def test_a_run_that_was_cut_off_equals_one_that_was_not(run: Started) -> None:
    shutil.copytree("run", "unbroken")
    shutil.rmtree("run/checkpoints/step_00000006")
    assert run.train()[0] == 0
    fresh = [json.loads(line) for line in Path("unbroken/metrics.jsonl").read_text().splitlines()]
    for again, line in zip(run.lines(), fresh, strict=True):
        assert {key: again[key] for key in line if key not in MEASURED} == {
            key: line[key] for key in line if key not in MEASURED}


def test_another_global_batch_goes_on_with_the_first_sequence_not_seen(run: Started, numbers: list[int]) -> None:
    lines = run.go_on("data.global_batch=8")
    lines += run.go_on("run.steps=9", "data.global_batch=2")[2:]
    assert numbers == list(range(24, 24 + 8 + 8 + 2)), "each sequence once"
    assert [line["tokens"] for line in lines] == [SEQ * seen for seen in (32, 40, 42)]
    assert (run.state(9)["sequences"], run.state(9)["tokens"]) == (42, 42 * SEQ)


REFUSED = {  # a change: what the keys are then said to have been
    "attention.rope_theta=500.0": ["10000.0"], "model.norm_eps=0.1": ["1e-05"], "attention.window=4": ["null"],
    "moe.top_k=1": ["2"], "moe.activation=geglu": ["swiglu"], "moe.load_balance_coefficient=0.5": ["0.01"],
    "data.seq_len=8": ["16"], "data.held_out=0.4": ["0.1"], "run.seed=7": ["0"],
    "precision.compute=bfloat16": ["float32"], "optim.betas=[0.5, 0.5]": ["[0.9, 0.95]"],
    "optim.moments=bfloat16": ["float32"],
    "parallel.row_budget=1.5 parallel.over_budget=drop": ["null", "passes"],
}


@pytest.mark.parametrize(("changes", "values"), REFUSED.items(), ids=REFUSED)
def test_what_is_not_known_to_be_harmless_is_refused_until_it_is_allowed(
    run: Started, changes: str, values: list[str]
) -> None:
    overrides = changes.split(" ") if len(values) > 1 else [changes]
    keys = [override.partition("=")[0] for override in overrides]
    said = run.refused(*overrides)
    assert all(f"{key}={value} (now " in said for key, value in zip(keys, values, strict=True))
    allow = f"run.allow_changes=[{','.join(keys)}]"
    assert allow in said
    status, said = run.train("run.steps=8", *overrides, allow)
    assert status == 0, said
    assert all(f"{override} (was {value})" in said for override, value in zip(overrides, values, strict=True))
    assert "run.allow_changes" not in said, "it is of this start"
    assert yaml.safe_load(Path("run/config.yaml").read_text())["run"]["allow_changes"] == [], "allowed this once"


@pytest.mark.parametrize("change", ["model.d_model=32", "moe.num_experts=8", "model.tied_embeddings=true"])
def test_another_models_weights_cannot_be_allowed(run: Started, change: str) -> None:
    said = run.refused(change, "run.allow_changes=[model,moe]")
    assert "another model" in said
    assert f"{change.partition('=')[0]}=" in said


def test_what_is_harmless_is_said(run: Started) -> None:
    changes = ["optim.lr=0.002", "optim.weight_decay=0.5", "parallel.recompute=full", "monitor.eval_sequences=3",
               "checkpoint.keep=2", "data.micro_batch=2"]
    status, said = run.train("run.steps=8", *changes)
    assert status == 0, said
    assert all(f"{change} (was " in said for change in (*changes, "run.steps=8"))
    said = run.train("run.steps=9")[1]
    assert "optim.lr=0.01 (was 0.002)" in said, "an override that is not repeated falls back"


def test_a_key_that_means_nothing_to_the_model_may_change(run: Started) -> None:
    assert "feed_forward.d_ff=64 (was 1024)" in run.train("run.steps=8", "feed_forward.d_ff=64")[1]


def test_of_each_key_outside_the_model_it_is_decided_whether_it_may_change() -> None:
    plain = Config()
    keys = {f"{group}.{key}" for group, values in plain.model_dump().items() for key in values}
    assert {key for key in keys if not is_harmless(key, plain, plain) and not decides_text(key)
            and not key.startswith(("model.", "attention.", "feed_forward.", "moe."))} == {
        "run.seed", "data.seq_len", "optim.name", "optim.betas", "optim.eps", "optim.moments", "optim.factored",
        "optim.momentum", "precision.compute", "precision.reduce", "parallel.over_budget"}


def test_allowing_what_is_no_key_is_refused_and_what_did_not_change_is_said(run: Started) -> None:
    assert "attention.window" in run.refused("run.allow_changes=[attention.windw]")
    assert "attention.window" in run.refused("run.allow_changes=[model.window]"), "where it was in earlier versions"
    assert "attention.window, which is as it was" in run.train("run.steps=8", "run.allow_changes=[attention.window]")[1]


def test_other_text_is_refused_wherever_it_lies(run: Started, numbers: list[int]) -> None:
    write_text(run.folder / "other", seed=1)
    assert "data.files" in run.refused("data.files=[other/*.txt]")
    shutil.move("text", "moved")
    write_text(run.folder / "text", seed=1)
    assert "data.files" in run.refused(), "other text in files of the same names"
    status, said = run.train("run.steps=7", "data.files=[moved/*.txt]")
    assert status == 0, said
    assert "data.files" in said
    assert numbers == [24, 25, 26, 27]
    numbers.clear()
    status, said = run.train("run.steps=8", "run.allow_changes=[data.files]")
    assert status == 0, said
    assert numbers == [0, 1, 2, 3], "the new text from its first sequence on"
    assert run.lines()[-1]["tokens"] == 8 * BATCH * SEQ
    run.train("run.steps=9")
    assert numbers[4:] == [4, 5, 6, 7]


def test_another_tokenizer_is_refused_and_the_same_one_may_move(
    with_tokenizer: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(with_tokenizer, tmp_path / "here")
    monkeypatch.chdir(run.folder)
    other = write_tokenizer(run.folder / "other.json", 1)
    assert "data.tokenizer" in run.refused(f"data.tokenizer={other}")
    shutil.copy("tok.json", "same.json")
    status, said = run.train("run.steps=7", "data.tokenizer=same.json")
    assert status == 0, said
    assert "data.tokenizer=same.json" in said
    shutil.copy("other.json", "same.json")
    assert "data.tokenizer" in run.refused("data.tokenizer=same.json"), "other content under the same name"
    Path("same.json").unlink()
    status, said = run.train("run.steps=8", config="run/config.yaml")
    assert status == 0, said
    assert "tokenizer.json" in said, "the checkpoint's own copy, where the run's file is gone"


def test_another_seq_len_goes_on_by_tokens(run: Started, numbers: list[int]) -> None:
    status, said = run.train("run.steps=8", "data.seq_len=8", "run.allow_changes=[data.seq_len]")
    assert status == 0, said
    assert "epoch 0 goes on with sequence 48" in said
    assert numbers == list(range(48, 56))
    assert run.lines()[-1]["tokens"] == STEPS * BATCH * SEQ + 2 * BATCH * 8
    run.train("run.steps=9", "data.seq_len=8")
    assert numbers[8:] == list(range(56, 60))


def test_more_steps_never_raise_the_rate(run: Started) -> None:
    rates = [line["lr"] for line in run.lines()]
    Path("run/checkpoints/step_00000006/checkpoint.json").unlink()
    status, said = run.train("run.steps=9")
    assert status == 0, said
    assert f"{rates[3]:.4g}" in said, "where it stood at step 3"
    assert run.train("run.steps=12")[0] == 0
    rates = [line["lr"] for line in run.lines()]
    assert rates == sorted(rates, reverse=True)
    assert rates[8:] == pytest.approx([0.001] * 4)


def test_a_checkpoint_that_does_not_say_where_it_stands(run: Started, numbers: list[int]) -> None:
    """Those of earlier versions hold step and seed alone."""
    path = Path("run/checkpoints/step_00000006/checkpoint.json")
    manifest = json.loads(path.read_text())
    manifest["state"] = {"step": 6, "seed": 0}
    path.write_text(json.dumps(manifest))
    status, said = run.train("run.steps=7")
    assert status == 0, said
    assert "not known" in said
    assert numbers[0] == 24
    assert run.lines()[-1]["tokens"] == 7 * BATCH * SEQ
    assert run.lines()[-1]["lr"] <= run.lines()[-2]["lr"]


def test_weights_that_are_no_numbers_are_never_saved(run: Started) -> None:
    status, said = run.train("run.steps=7", "optim.lr=1e300", "monitor.eval_every=100")
    assert status == 1, said
    assert "step_00000006" in said
    assert store.latest_checkpoint(Path("run")) == Path("run/checkpoints/step_00000006")


def test_weights_that_are_too_large_are_left_by_removing_their_checkpoint(run: Started) -> None:
    """They are numbers yet, so that they are saved, and every step from there on fails."""
    wild = ["optim.lr=1e37", "optim.final_lr_share=1", "checkpoint.every=1", "monitor.every=100",
            "monitor.eval_every=100"]
    assert run.train("run.steps=20", *wild)[0] == 1
    spoilt = Path("run/checkpoints/step_00000007")
    assert store.latest_checkpoint(Path("run")) == spoilt
    status, said = run.train("run.steps=20")
    assert status == 1, said
    assert f"{spoilt}: remove it" in said
    shutil.rmtree(spoilt)
    assert run.train("run.steps=8")[0] == 0


def test_a_checkpoint_with_weights_that_are_no_numbers_is_refused(
    run: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as blind:  # as an earlier version, which did not look
        blind.setattr(store, "not_finite", lambda *args: None)
        blind.setattr("moescale.rollback.is_finite", lambda figures: True)
        assert run.train("run.steps=7", "optim.lr=1e300")[0] == 0
    said = run.refused()
    assert "step_00000007: model." in said
    assert "go on from step_00000006" in said
    shutil.rmtree("run/checkpoints/step_00000007")
    assert run.train("run.steps=8")[0] == 0


def call(*words: str) -> None:
    result = CliRunner().invoke(app, [*words])
    assert result.exit_code == 0, result.output


def weights(checkpoint: str) -> dict[str, torch.Tensor]:
    model = moescale.load(checkpoint)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_converted_weights_begin_anew_in_their_own_folder(run: Started, numbers: list[int]) -> None:
    call("edit", "run", "made", "--experts", "8")
    status, said = run.train("run.steps=5", "run.dir=tuned", config="made/config.yaml")
    assert status == 2
    assert "random" in said, "not a new model in another folder"
    assert not Path("tuned/checkpoints").exists()
    said = run.train("attention.rope_theta=500", config="made/config.yaml")[1]
    assert "run.allow_changes=[attention.rope_theta]" in said
    new = ["data.seq_len=8", "run.seed=5", "moe.load_balance_coefficient=0.1", "run.steps=3", "optim.lr=1e-30",
           "optim.betas=[0.5,0.5]", "checkpoint.every=2"]
    status, said = run.train(*new, config="made/config.yaml")
    assert status == 0, said
    assert "going on from made/checkpoints/step_00000000" in said
    assert "begin anew" in said
    assert numbers == list(range(12)), "the text from its first sequence on"
    lines = [json.loads(line) for line in Path("made/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"]) for line in lines] == [(1, 32), (2, 64), (3, 96)]
    before, after = weights("made/checkpoints/step_00000000"), weights("made")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "trained from the converted weights"
    status, said = run.train("run.steps=4", "optim.lr=0.01", config="made/config.yaml")
    assert status == 0, said
    assert "going on from made/checkpoints/step_00000003" in said
    assert "begin anew" not in said
    assert numbers[12:] == [12, 13, 14, 15]


def test_converted_with_its_optimizer_a_run_goes_on(run: Started, numbers: list[int]) -> None:
    call("edit", "run", "made", "--place-experts", "2")
    status, said = run.train("run.steps=8", config="made/config.yaml")
    assert status == 0, said
    assert "going on from made/checkpoints/step_00000006" in said
    assert numbers == list(range(24, 32))
    assert "data.held_out" in run.train("run.steps=9", "data.held_out=0.4", config="made/config.yaml")[1]


def test_converted_weights_find_their_tokenizer(
    with_tokenizer: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(with_tokenizer, tmp_path / "here")
    monkeypatch.chdir(run.folder)
    call("convert", "run", "exported", "--to", "megatron", "--style", "torch_dist")
    call("convert", "exported", "made", "--to", "moescale")
    write_tokenizer(Path("tokenizer.json"), 1)  # another one, in the working directory
    new = ["data.files=[text/*.txt]", "data.cache_dir=cache", "data.seq_len=16", "data.global_batch=2", "run.steps=1"]
    status, said = run.train(*new, config="made/config.yaml")
    assert status == 0, said
    assert "step_00000000" in said
    os.chdir("text")
    status, said = run.train("run.steps=2", "run.dir=../made", "data.files=['*.txt']", config="../made/config.yaml")
    assert status == 0, said
    assert "data.tokenizer" in run.train("run.steps=3", "run.dir=../made", "data.files=['*.txt']",
                                         "data.tokenizer=../tokenizer.json", config="../made/config.yaml")[1]


def test_a_configuration_in_a_run_directory_belongs_to_that_run(run: Started) -> None:
    assert "going on" in run.train("run.steps=7", config="run/config.yaml")[1]
    shutil.copytree("run", "moved")
    before = sorted(Path("run").rglob("*"))
    for config in ("moved/config.yaml", "moved/checkpoints/step_00000007/config.yaml"):
        status, said = run.train("run.steps=8", config=config)
        assert status == 2
        assert "run.dir=run" in said
    assert sorted(Path("run").rglob("*")) == before
    status, said = run.train("run.steps=8", "run.dir=moved", config="moved/config.yaml")
    assert status == 0, said
    assert "going on from moved" in said
    os.chdir("text")
    assert "lies in the run directory" in run.train("run.steps=8", config="../run/config.yaml")[1], "a relative run.dir"
