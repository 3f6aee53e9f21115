"""A configuration file of any origin is read within bounds of time and memory, and refused in one line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from moescale.config import ConfigError, load_config, parse_config

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(24))
HOSTILE = {
    "holds itself": "model: &a {pattern: [*a]}", "holds itself at the top": "&a [*a]", "laughs": LAUGHS,
    "laughs in a value": "data:\n  files: &a [x, x]\nrun: &b [*a, *a]\nmodel: [" + "*b, " * 30_000 + "]",
    "deep lists": "model: " + "[" * 100_000, "deep mappings": "{a: " * 100_000, "deep blocks": "- " * 100_000,
    "deep questions": "? " * 100_000, "a long number": "run:\n  steps: " + "9" * 100_000,
    "a long number in hexadecimal": "run:\n  steps: 0x" + "f" * 100_000,
    "a number of minutes": "run:\n  seed: 1" + ":1" * 9999,
    "a date that is none": "run:\n  dir: 2001-99-99\n  steps: x", "a tag": "run: !!python/object/apply:os.system [x]",
    "an int that is none": "run:\n  steps: !!int x", "a long key": "x" * 900_000 + ": 1",
    "large": "x: " + "y" * 2_000_000,
    "many": "- \n" * 300_000, "control": "run: {dir: \"\\x00\\x1b[31m\"}\nmodel: {\"\\u202e\": 1}", "nothing": "\0",
    "odd bytes": "\udcff", "a list as a key": "? [a]\n: b",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_one_line_soon(tmp_path: Path, text: str) -> None:
    path, begin = tmp_path / "config.yaml", time.process_time()
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert time.process_time() - begin < 10
    assert len(str(caught.value)) < 3000
    assert not any(ord(letter) < 32 or letter == "\N{RIGHT-TO-LEFT OVERRIDE}" for letter in str(caught.value))


@pytest.mark.parametrize("override", [
    "attention.num_heads=1e9", "model.num_layers=1000000000", "moe.num_experts=1e9", "data.global_batch=999999999989",
    "data.seq_len=1e9", "data.micro_batch=1e11", "parallel.dp_shard=1e9", "parallel.tp=1e9", "parallel.ep=1e9",
    "attention.num_heads=999999999989", "moe.num_expert_groups=1e12", "model.vocab_size=1e18", "run.steps=1e17",
])
def test_large_numbers_are_settled_or_refused_at_once(tmp_path: Path, override: str) -> None:
    path, begin = tmp_path / "config.yaml", time.process_time()
    path.write_text("")
    try:
        load_config(path, [override]).for_world(4)
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017
    assert time.process_time() - begin < 2


def test_as_many_experts_as_no_machine_has() -> None:
    with pytest.raises(ConfigError, match=r"model\.num_layers=10000 x moe\.num_experts=100000"):
        parse_config({"model": {"num_layers": 10_000}, "moe": {"num_experts": 100_000}}, "")


def test_a_micro_batch_is_the_largest_that_fills_the_pipeline() -> None:
    """As counting through all numbers gives."""
    for share, pp in ((12, 4), (7, 2), (16, 2), (1, 2), (30, 3)):
        config = parse_config({"data": {"global_batch": share}, "parallel": {"pp": pp, "pp_schedule": "gpipe"}}, "")
        assert config.for_world(pp).data.micro_batch == max(
            n for n in range(1, share + 1) if share % n == 0 and (share // n >= pp or n == 1))


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "missing"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / "config.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path)


def test_a_stored_configuration_names_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "outside.yaml").write_text("run: {steps: 7}")
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "config.yaml"
    path.write_text("base: ../outside.yaml")
    assert load_config(path).run.steps == 7
    with pytest.raises(ConfigError, match="base"):
        load_config(path, whole=True)
