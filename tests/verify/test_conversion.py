"""Both models of a conversion on the same tokens: right ones pass, whatever rounding does; wrong ones do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moescale.config import ConfigError
from moescale.convert import copying
from moescale.convert.formats.hf import weights as hf
from moescale.convert.mapping.mapped import FileLayout
from moescale.convert.run import convert, open_source
from moescale.verify.conversion import compare_models
from moescale.verify.transformers import logits_and_margins
from tests.support.models import DENSE, make_config, write_run


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve experts in four layers, of which rounding flips some of most sequences; in Hugging Face's format, too."""
    folder = tmp_path_factory.mktemp("mixture")
    run = write_run(folder / "run", make_config({"num_layers": 4, "window": 70}), std=0.4)
    convert(open_source(run), folder / "hf", "hf", FileLayout())
    return folder


@pytest.mark.parametrize(("source", "to"), [("run", "hf"), ("hf", "hf"), ("hf", "megatron"), ("run", "deepspeed")])
def test_rounded_weights_are_held_to_rounded_weights(mixture: Path, tmp_path: Path, source: str, to: str) -> None:
    said = []

    def check(*opened: Any) -> None:
        said.append(compare_models(*opened))

    convert(open_source(mixture / source), tmp_path / "there", to, FileLayout(), torch.bfloat16, check=check)
    assert float(said[0].split(" of the logits ")[1].split(",")[0]) < 1e-4


def test_rounding_flips_experts_of_these_weights(mixture: Path) -> None:
    """Or the test above would prove nothing: unrounded, the logits of some tokens are others altogether."""
    tokens = [torch.randint(264, (2, 64), generator=torch.Generator().manual_seed(0))]
    ((exact, _),), ((rounded, _),) = (logits_and_margins(mixture / "hf", tokens, dtype)
                                      for dtype in (None, torch.bfloat16))
    assert float((exact - rounded).abs().max()) > 0.05 * float(exact.abs().max())


def planted(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    real_config, real_region = hf.write_config, copying.write_region

    def write_config(*words: Any) -> dict[str, Any]:
        values = real_config(*words)
        return {**values, **{"no window": {"sliding_window": None}, "a window of one more": {"sliding_window": 71},
                             "theta": {"rope_theta": values["rope_theta"] * 1.01},
                             "eps": {"rms_norm_eps": 1e-4}}.get(fault, {})}

    def write_region(stored: Any, place: Any, values: torch.Tensor) -> None:
        if fault == "two rows of a router" and values.shape == (12, 16):
            values = values[[1, 0, *range(2, 12)]]
        real_region(stored, place, values)

    monkeypatch.setattr(hf, "write_config", write_config)
    monkeypatch.setattr(copying, "write_region", write_region)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("fault", ["no window", "a window of one more", "theta", "eps", "two rows of a router"])
def test_a_wrong_conversion_is_found(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, dtype: torch.dtype | None
) -> None:
    planted(monkeypatch, fault)
    with pytest.raises(ConfigError, match=r"--verify: .* nothing was written"):
        convert(open_source(mixture / "run"), tmp_path / "there", "hf", FileLayout(), dtype, check=compare_models)
    assert not (tmp_path / "there").exists()


def test_a_row_of_the_vocabulary_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", make_config({**DENSE, "window": None}))
    real = copying.write_region

    def wrong(stored: Any, place: Any, values: torch.Tensor) -> None:
        if values.shape == (264, 16):
            values = torch.cat((values[:-1], -values[-1:]))
        real(stored, place, values)

    monkeypatch.setattr(copying, "write_region", wrong)
    monkeypatch.setattr("moescale.verify.conversion.fingerprints", lambda weights, found: {})
    with pytest.raises(ConfigError, match="--verify"):
        convert(open_source(run), tmp_path / "there", "hf", FileLayout(), check=compare_models)


def test_tokens_behind_a_tie_are_not_compared(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first token on of which two experts are as good; if none is certain, nothing is said to be equal."""
    opened = open_source(mixture / "run")
    monkeypatch.setattr("moescale.verify.conversion.CERTAIN", 1e-3)
    said: list[str] = []
    convert(opened, tmp_path / "some", "hf", FileLayout(), check=lambda *words: said.append(compare_models(*words)))
    assert "that follow a token" in said[0]
    monkeypatch.setattr("moescale.verify.conversion.CERTAIN", 1.0)
    with pytest.raises(ConfigError, match="at 0 positions"):
        convert(opened, tmp_path / "none", "hf", FileLayout(), check=compare_models)
