"""What recompute runs again is not counted again, however much of it runs."""

from __future__ import annotations

import pytest
from torch.utils.checkpoint import set_checkpoint_early_stop

from moescale.parallel.ranks import run_ranks
from tests.support.layouts import compare, run_steps


def run_to_the_end(family: str, extent: str) -> dict:
    with set_checkpoint_early_stop(False):  # else it stops before the counting, which is last
        return run_steps(family, {"recompute": extent, "row_budget": 0.6}, "float32", 2)


@pytest.mark.parametrize("family", ["gshard", "deepseek"])
def test_recompute_changes_nothing(family: str) -> None:
    expected = run_ranks(1, run_steps, family, {}, "float32", 2)[0]
    for extent in ("selective", "full"):
        compare(run_ranks(1, run_to_the_end, family, extent)[0], expected, 1e-5)
