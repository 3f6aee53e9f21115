"""Values are read by the type of their key, and what cannot be meant is told how it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from moescale.cli import app
from moescale.config import Config, ConfigError, load_config, parse_config, read_overrides
from moescale.config.values import group

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def moescale(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def read(key: str, text: str) -> Any:
    home, _, name = key.partition(".")
    return read_overrides([f"{key}={text}"])[home][name]


@pytest.mark.parametrize(("key", "text", "value"), [
    ("run.steps", "1e5", 100_000), ("run.steps", "2_000", 2000), ("run.steps", "0x10", 16), ("run.steps", "0o17", 15),
    ("optim.lr", "3", 3.0), ("optim.lr", "1E-3", 1e-3), ("optim.lr", ".5", 0.5), ("optim.lr", "1_000.5e-6", 1000.5e-6),
    ("run.dir", "1e5", "1e5"), ("run.dir", "007", "007"), ("run.dir", "1:30", "1:30"), ("run.dir", "no", "no"),
    ("run.dir", "2024-01-01", "2024-01-01"), ("run.dir", "a #b: c", "a #b: c"), ("run.dir", "'null'", "null"),
    ("monitor.wandb_project", "0x10", "0x10"), ("monitor.wandb", "off", "off"), ("parallel.recompute", "none", "none"),
    ("parallel.compile", "yes", True), ("parallel.compile", "Off", False), ("attention.window", "null", None),
    ("optim.clip_norm", "~", None), ("data.files", "a.txt", ("a.txt",)), ("data.files", "*.md, 007", ("*.md", "007")),
    ("data.files", '"a,b.txt"', ("a,b.txt",)), ("data.files", "[a.txt, 1e3]", ("a.txt", "1e3")),
    ("data.files", "[]", ()),
    ("optim.betas", "0.9,0.99", (0.9, 0.99)), ("optim.betas", "[0.9, 0.99]", (0.9, 0.99)),
    ("model.pattern", "{channel_mixer: moe}", ({"channel_mixer": "moe"},)),
])
def test_a_value_is_read_by_the_type_of_its_key(tmp_path: Path, key: str, text: str, value: Any) -> None:
    assert read(key, text) == value
    assert type(read(key, text)) is type(value)
    home, _, name = key.partition(".")
    if "#" not in text and text[:1] != "*":  # which mean something in YAML without quotes
        file = tmp_path / "run.yaml"
        file.write_text(f"{home}:\n  {name}: {text}\n")
        assert load_config(file) == parse_config({home: {name: value}}, "test"), "a file means the same"


@pytest.mark.parametrize(("words", "advice"), [
    ("run.steps=010", "0o10"), ("run.steps=1.000", "1000"), ("run.steps=1,000", "1000"), ("run.steps=2.5", "whole"),
    ("run.steps=1e99", "whole"), ("run.steps=1:30", "whole"), ("run.steps=\uff11\uff12", "0 to 9"),
    ("run.steps=", "whole"),
    ("run.dir=null", "quotes"), ("run.dir=", "text"), ("run.dir=[a]", "quotes"), ("data.files=null", "[]"),
    ("data.files=", "list"), ("data.files=a,,b", "[a, b]"), ("attention.window=none", "null"), ("optim.lr=0,1", "0.1"),
    ("optim.lr=5%", "0.05"), ("optim.lr=nan", "number"), ("optim.betas=0.9", "2 numbers"),
    ("optim.betas=(0.9,0.99)", "[ ]"),
    ("parallel.compile=1", "true"),
    ("moe.router=Mixtral", "mixtral?"), ("monitor.wandb=yes", "auto"), ("run.dir='a", "quotes"),
    ("run.dir=\udcff", "UTF-8"),
    ("--optim.lr=3e-4", "write optim.lr=3e-4"), ("-optim.lr=3", "write optim.lr=3"),
    ("--optim.lr 3", "write optim.lr=3"), ("optim.lr 3", "write optim.lr=3"), ("optim.lr = 3", "write optim.lr=3"),
    ("optim/lr=3", "write optim.lr=3"), ("optim.lr: 3", "write optim.lr=3"), ("+optim.lr=3", "write optim.lr=3"),
    ("Optim.LR=3", "write optim.lr=3"), ("lr=3", "write optim.lr=3"),
    ("every=3", "checkpoint.every=3 or monitor.every=3"),
    ("optim={lr: 3}", "one by one"), ("optim.lrr=3", "optim.lr?"), ("model.lr=3", "optim.lr?"), ("other.yaml", "base:"),
    ("--layout", "--layout"), ("=3", "group.key=value"), ("optim.=3", "known"),
])
def test_what_cannot_be_read_is_told_how_it_is_written(words: str, advice: str) -> None:
    parts = words.split(" ") if not words.startswith("optim={") else [words]
    with pytest.raises(ConfigError) as refused:
        read_overrides(parts)
    assert advice in str(refused.value)
    assert "\n" not in str(refused.value)


def test_dashes_before_an_override_reach_the_advice(tmp_path: Path) -> None:
    for command in ("train", "verify", "config"):
        code, output = moescale(command, QUICKSTART, f"--run.dir={tmp_path}/run", "--optim.lr", "3")
        assert (code, len(output.splitlines())) == (2, 1)
        assert f"write run.dir={tmp_path}/run" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "named"), [
    ("run:\n  steps: 5\n  seed: 1\n  steps: 6\n", ("run.steps", "2", "4")),
    ("run: {steps: 5}\nmoe: {}\nrun: {seed: 1}\n", ("run", "1", "3")),
    ("model:\n  pattern:\n  - mixer: attention\n    mixer: attention\n", ("model.pattern.0.mixer", "3", "4")),
    ("run:\n  <<: {steps: 5}\n", ("<<", "2", "base")),
    ("run:\n  dir: !!python/object/apply:os.getcwd []\n", ("run.dir", "python", "plain")),
    ("run:\n  dir: !env HOME\n", ("run.dir", "!env", "plain")),
])
def test_a_file_that_says_two_things_is_refused(tmp_path: Path, text: str, named: tuple[str, ...]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert all(word in str(refused.value) for word in (*named, str(file)))


@pytest.mark.parametrize("path", ["s3://bucket/run", "gs://b", "hdfs://node:8020/run", "file:///tmp/run", ""])
def test_a_url_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    for key in ("run.dir", "data.cache_dir", "data.tokenizer", "data.files"):
        code, output = moescale("train", QUICKSTART, f"{key}='{path}'")
        assert (code, len(output.splitlines())) == (2, 1)
        assert key in output
    if path:
        for words in (("report", path), ("generate", path), ("convert", QUICKSTART, path, "--to", "hf"),
                      ("report", tmp_path, "-o", path), ("config", path)):
            code, output = moescale(*words)
            assert (code, len(output.splitlines())) == (2, 1), words
    assert not list(tmp_path.iterdir()), "nothing was made"


def test_config_shows_every_key_and_what_a_file_settles_to(tmp_path: Path) -> None:
    code, output = moescale("config", QUICKSTART, "optim.betas=0.9,0.99")
    assert code == 0
    lines = output.splitlines()
    for home in Config.model_fields:
        for name, sentence in group(home).sentences().items():
            (place,) = (place for place, line in enumerate(lines) if line[2:].startswith(f"{home}.{name} = "))
            assert " ".join(output.split()).count(" ".join(sentence.split())) >= 1, f"{home}.{name}"
            assert lines[place][0] in "* "
    assert any(line.startswith("* optim.betas = [0.9, 0.99]") for line in lines), "a value that differs is marked"
    assert any(line.startswith("  optim.eps = ") for line in lines)
    code, output = moescale("config", QUICKSTART, "optim.betas=0.9,0.99", "--yaml")
    file = tmp_path / "all.yaml"
    file.write_text(output)
    assert load_config(file) == load_config(QUICKSTART, ["optim.betas=0.9,0.99"])
    assert moescale("config", "run.steps=7", "--yaml")[1].startswith("run:"), "without a file"
    assert moescale("config")[0] == 0


def test_what_config_writes_of_a_value_is_read_as_the_same(tmp_path: Path) -> None:
    """Texts that look like something else survive config.yaml."""
    for text in ("1e5", "007", "null", "yes", "1:30", "2024-01-01", "a: b", "[x]", "~", "é\u2028"):
        config = parse_config({"run": {"dir": text}, "data": {"files": [text, "b"]}}, "test")
        file = tmp_path / "config.yaml"
        file.write_text(config.to_yaml(), encoding="utf-8")
        assert load_config(file) == config
        assert yaml.safe_load(config.to_yaml())["run"]["dir"] == text, "for any other reader too"


def test_the_version_names_what_a_report_of_a_fault_needs() -> None:
    code, output = moescale("--version")
    assert code == 0
    assert all(word in output for word in ("moescale", "torch", "Python"))


def test_keys_of_earlier_versions_are_refused_by_their_new_names_but_read_from_checkpoints(tmp_path: Path) -> None:
    old = tmp_path / "config.yaml"
    old.write_text("model: {d_model: 64, num_heads: 4, num_kv_heads: 1, window: 9, d_ff: 72, activation: relu}\n"
                   "moe: {d_ff: 80}\n")
    with pytest.raises(ConfigError, match=r"model\.num_heads is attention\.num_heads now"):
        load_config(old)
    with pytest.raises(ConfigError, match=r"model\.window is attention\.window now"):
        load_config(QUICKSTART, ["model.window=3"])
    config = load_config(old, whole=True)
    assert (config.model.d_model, config.attention.num_heads, config.attention.num_kv_heads) == (64, 4, 1)
    assert (config.attention.window, config.attention.head_dim) == (9, 32)
    assert (config.feed_forward.d_ff, config.feed_forward.activation, config.moe.d_ff) == (72, "relu", 80)
    old.write_text(config.to_yaml())
    assert load_config(old) == load_config(old, whole=True) == config
