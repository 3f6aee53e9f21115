"""What several folders of tests ask for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.command_line import TINY


@pytest.fixture(autouse=True)
def products_of_torch() -> Iterator[None]:
    """Let torch multiply as it does by itself again after a test that set this process up for training."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_float32_matmul_precision("highest")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with text and a small configuration, as working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "run": {"dir": "run", "steps": 40}}))
    return tmp_path
