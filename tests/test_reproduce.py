"""The frame of tools/reproduce can say "short", and its results belong to scripts and to the page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools" / "reproduce"))  # its scripts find each other so

from all import scripts  # noqa: E402
from frame import PAGE, RESULTS, Criterion, Figures, Reproduction, as_result, told, write_page  # noqa: E402


def reproduction(*criteria: Criterion) -> Reproduction:
    return Reproduction("Title", "Author, 2026", "a claim", "a miniature", lambda seed: {}, lambda figure, runs: None,
                        criteria)


@pytest.mark.parametrize(("values", "bounds", "passed"), [
    ((1.0, 9.0, 2.0), {"at_least": 2.0}, True), ((1.0, 9.0, 1.5), {"at_least": 2.0}, False),
    ((1.0, 9.0, 2.0), {"at_most": 2.0}, True), ((3.0, 1.0, 2.5), {"at_most": 2.0}, False),
    ((0.0, 0.0, 4.0), {"equals": 0.0}, True), ((0.0, 4.0, 4.0), {"equals": 0.0}, False),
    ((1.0, float("nan"), 1.0), {"at_most": 2.0}, False), ((float("inf"),) * 3, {"at_most": 2.0}, False),
])
def test_the_median_is_held_to_the_bound(values: tuple[float, ...], bounds: dict[str, float], passed: bool) -> None:
    runs: list[Figures] = [{"x": value} for value in values]
    verdict = Criterion("x", lambda figures: figures["x"], **bounds).judge(runs)
    assert (verdict.passed, len(verdict.values)) == (passed, len(values))


def test_one_criterion_that_falls_short_is_said_everywhere(tmp_path: Path) -> None:
    good = Criterion("good", lambda figures: 1.0, at_least=0.0)
    bad = Criterion("bad", lambda figures: 1.0, at_least=2.0)
    for name, criteria in (("one", (good,)), ("two", (good, bad))):
        result = as_result(reproduction(*criteria), [{}, {}, {}], [1.0, 2.0, 3.0])
        assert result["passed"] is (name == "one")
        assert told(name, result)[0].startswith(f"{name}: {'pass' if name == 'one' else 'short'}")
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    write_page(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "**1 of 2 keep all their bounds.**" in page
    assert "bad: 1 (>= 2) **short**" in page
    assert "good: 1 (>= 0) **short**" not in page


def test_every_result_is_of_a_script_and_on_the_page() -> None:
    page = PAGE.read_text()
    for result in RESULTS.glob("*.json"):
        assert result.stem in scripts(), f"no script gives {result.name}: remove it, or restore the script"
        assert result.with_suffix(".png").exists(), f"{result.name} has no plot"
        verdict = "pass" if json.loads(result.read_text())["passed"] else "**short**"
        assert re.search(rf"{re.escape(verdict)} \| \d+ \| `python tools/reproduce/{result.stem}.py`", page), (
            f"docs/reproduced.md does not say {verdict} of {result.stem}: run python tools/reproduce/all.py --page")


def test_the_survey_counts_what_attention_multiplies() -> None:
    """Within a window, four times for sequences four times as long, whatever this processor computes it with."""
    from survey import attention_flops

    short, long = (attention_flops(seq, {"window": 32}) for seq in (256, 1024))
    assert 3 * short < long < 5 * short
