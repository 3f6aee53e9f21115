"""The configurations that ship build, and have the papers' sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from moescale.config import load_config
from moescale.model.build import build_model
from moescale.planner.count import count_parameters, model_flops_per_token

CONFIGS = Path(__file__).parent.parent / "configs"
BILLIONS = {  # total and active, as published
    "mixtral_8x7b": (46.7, 12.9), "mixtral_8x22b": (141, 39), "palm_8b": (8.63, 8.63), "palm_540b": (540.35, 540.35),
    "switch_base": (7.4, None), "gshard_600b": (600, None),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_builds_and_is_counted_right(path: Path) -> None:
    config = load_config(path)
    model, count = build_model(config, "meta"), count_parameters(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count.total
    assert all(parameter.is_meta for parameter in model.parameters())
    for published, counted in zip(BILLIONS.get(path.stem, (None, None)), (count.total, count.active), strict=True):
        if published is not None:
            digits = 0.04 if path.stem == "gshard_600b" else 0.004  # GShard publishes its size in round numbers
            assert counted / 1e9 == pytest.approx(published, rel=digits)


def test_palm_sizes_to_the_second_digit() -> None:
    for name, billions in (("palm_8b", 8.63), ("palm_540b", 540.35)):
        assert count_parameters(load_config(CONFIGS / f"{name}.yaml")).total / 1e9 == pytest.approx(billions, abs=0.01)


def test_palm_utilisation_is_the_papers() -> None:
    """238.3 thousand tokens a second on 6144 chips of 275 TFLOP/s are 46.2 % (PaLM, table 3)."""
    flops = model_flops_per_token(load_config(CONFIGS / "palm_540b.yaml"))
    assert 238.3e3 * flops / (6144 * 275e12) == pytest.approx(0.462, abs=0.001)
