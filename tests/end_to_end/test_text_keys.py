"""What a run says of its text: what was left out, how often it is seen, and when that is too often."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from moescale.cli import app
from tests.support.groups import in_groups

SEQ, BATCH, STEPS = 8, 4, 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration, thirty lines of text of which one is bad, and two to evaluate on."""
    monkeypatch.chdir(tmp_path)
    values = {
        "run": {"dir": "run", "steps": STEPS},
        "data": {"cache_dir": "cache", "seq_len": SEQ, "global_batch": BATCH},
        **in_groups({"vocab_size": 264, "d_model": 8, "num_layers": 1,
                     "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}),
        "moe": {"num_experts": 2, "top_k": 1, "d_ff": 8}, "monitor": {"every": 1, "moved_every": None},
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(values))
    lines = [json.dumps({"body": f"this is text {number:02d}"}) for number in range(30)]
    Path("text.jsonl").write_text("\n".join([*lines[:9], '{"body": "cut', *lines[10:]]))
    Path("own.jsonl").write_text("\n".join(lines[20:22]))
    return tmp_path


def train(*overrides: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", "tiny.yaml", *overrides])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def test_what_is_left_out_and_how_often_the_rest_is_seen(folder: Path) -> None:
    text = ["data.files=text.jsonl", "data.held_out_files=own.jsonl", "data.text_field=body"]
    status, said = train(*text)
    assert (status, said.count("moescale: ")) == (2, 1)
    assert "text.jsonl line 10" in said
    assert "data.bad_documents" in said
    status, said = train(*text, "data.bad_documents=skip")
    assert status == 0, said
    assert re.search(r"1 document\S* .*text.jsonl line 10", said)
    assert re.search(r"2 document\S* .*data.held_out_files", said)
    windows = (27 * 16 - 1) // SEQ
    epochs = STEPS * BATCH / windows
    assert f"27 documents, seen {epochs:.3g} times by step {STEPS}" in said
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == pytest.approx([epochs * step / STEPS for step in range(1, STEPS + 1)])
    again = (*text, "data.bad_documents=skip", "run.dir=two", "run.steps=40")
    status, said = train(*again, "data.max_epochs=3.02")
    assert (status, "data.max_epochs=4" in said) == (0, False), said
    status, said = train(*again, "run.steps=41", "data.max_epochs=3.02")
    assert (status, "data.max_epochs=4" in said) == (2, True), said


def test_library_is_not_trained_on_for_long(folder: Path) -> None:
    status, said = train("run.steps=1000000", "data.seq_len=2048", "data.global_batch=16")
    assert (status, said.count("moescale: ")) == (2, 1), said
    assert "data.files" in said
    assert re.search(r"data.max_epochs=1\d\d\d", said)
    assert not (folder / "run").exists()
    status, said = train("run.steps=1")
    assert (status, "Python" in said) == (0, False), said
