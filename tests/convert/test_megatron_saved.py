"""What Megatron-Core's own save wrote, in four versions, is read and has the logits of Megatron-Core's own model.

`megatron/make.py` made the checkpoints; `megatron/logits.json` holds what its models answered.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import moescale
from moescale.cli import app
from moescale.config import ConfigError
from moescale.convert.formats.megatron import files as megatron_files
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.mapping.table import Row
from moescale.convert.run import convert, open_source
from moescale.verify import megatron
from moescale.verify.conversion import compare_models

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
    reference = megatron.logits(open_source(there), torch.tensor([known["tokens"]]))[0, -4:]
    torch.testing.assert_close(reference, torch.tensor(known["logits"]), rtol=0, atol=2e-6)
    logits = moescale.load(tmp_path / "run").logits(torch.tensor([known["tokens"]]))[0, -4:]
    torch.testing.assert_close(logits, torch.tensor(known["logits"]), rtol=0, atol=1e-5)
    if kind != "files":
        assert any(name.startswith("optimizer.state.exp_avg.") for name in open_source(there).left_out)


FAULTS = {"gate and up": ("gate", "up"), "keys and values": ("k", "v"), "norms": ("mixer_norm", "channel_norm")}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("archive", ["mixtral-0.16.1", "sigmoid-0.20.0dev"])
def test_a_wrong_table_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: str, fault: str) -> None:
    """What is read is read back, right or wrong: another reading of Megatron's arguments and tensors can tell."""
    one, two = FAULTS[fault]

    def exchanged(found: Row) -> Row:
        other = {one: two, two: one}
        return replace(found, native=tuple(other.get(part, part) for part in found.native))

    there = unpacked(MADE / f"{archive}.tar.xz", tmp_path / "there")
    wrong = {kind: tuple(exchanged(found) for found in rows) for kind, rows in megatron_files.DISTRIBUTED.items()}
    monkeypatch.setattr(megatron_files, "DISTRIBUTED", wrong)
    with pytest.raises(ConfigError, match="--verify: largest difference"):
        convert(open_source(there), tmp_path / "run", "moescale", FileLayout(), check=compare_models)
