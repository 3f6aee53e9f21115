"""What Megatron-Core's own save wrote, in four versions, is read and has the logits of Megatron-Core's own model.

`megatron/make.py` made the checkpoints; `megatron/logits.json` holds what its models answered.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import moescale
from moescale.checkpoint.convert import open_source
from moescale.cli import app

MADE = Path(__file__).parent / "megatron"
ARCHIVES = sorted(MADE.glob("*.tar.xz"))
LOGITS = json.loads((MADE / "logits.json").read_text())
SAME_MODEL = {"files": "mixtral", "singleton": "mixtral"}  # otherwise saved


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder


def test_of_every_version() -> None:
    versions = {archive.name.partition("-")[2].removesuffix(".tar.xz") for archive in ARCHIVES}
    assert versions == {"0.13.1", "0.15.3", "0.16.1", "0.20.0dev"}


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def test_logits_of_its_own_model(tmp_path: Path, archive: Path) -> None:
    """Some were saved by one rank, some by two with half of the experts each."""
    there = unpacked(archive, tmp_path / "there")
    result = CliRunner().invoke(app, ["convert", str(there), str(tmp_path / "run"), "--to", "moescale", "--verify"])
    assert result.exit_code == 0, result.output
    kind = archive.name.partition("-")[0]
    known = LOGITS[SAME_MODEL.get(kind, kind)]
    logits = moescale.load(tmp_path / "run").logits(torch.tensor([known["tokens"]]))[0, -4:]
    torch.testing.assert_close(logits, torch.tensor(known["logits"]), rtol=0, atol=1e-5)
    if kind != "files":
        assert any(name.startswith("optimizer.state.exp_avg.") for name in open_source(there).left_out)
