"""What all reproductions share: seeds, criteria, medians, a JSON and a plot for each, and the page of all.

A script of this folder holds one `Reproduction` and ends with `main(REPRODUCTION)`. Run alone, it tries its seeds and
writes docs/reproduced/NAME.json and NAME.png; `python tools/reproduce/all.py` runs every script and writes the page.
What each seed gave is kept in runs/reproduced/, so that `--seeds 0`, `--seeds 1`, `--seeds 2` and then `--resume` do
the same in parts.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import operator
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "reproduced"
PAGE = ROOT / "docs" / "reproduced.md"
KEPT = ROOT / "runs" / "reproduced"  # what single seeds gave
SEEDS = (0, 1, 2)

Figures = dict[str, Any]  # what one seed gave: numbers by name, and lists of numbers for the plot


@dataclass(frozen=True)
class Criterion:
    """Bounds that the median over the seeds must keep.

    measure: one figure of what a seed gave. at_least, at_most, equals: the bounds; at least one of them is a number.
    """

    what: str
    measure: Callable[[Figures], float]
    at_least: float | None = None
    at_most: float | None = None
    equals: float | None = None

    def __post_init__(self) -> None:
        assert self._bounds(), "a criterion has a bound"

    def _bounds(self) -> dict[str, float]:
        bounds = {">=": self.at_least, "<=": self.at_most, "=": self.equals}
        return {sign: bound for sign, bound in bounds.items() if bound is not None}

    def judge(self, runs: Sequence[Figures]) -> Verdict:
        """Hold the median over the seeds to the bound. A value that is no number falls short."""
        values = tuple(float(self.measure(figures)) for figures in runs)
        median = math.nan if any(map(math.isnan, values)) else statistics.median(values)
        keeps = {">=": operator.ge, "<=": operator.le, "=": operator.eq}
        bounds = self._bounds().items()
        return Verdict(self.what, values, median, ", ".join(f"{sign} {bound:g}" for sign, bound in bounds),
                       all(keeps[sign](median, bound) for sign, bound in bounds))


@dataclass(frozen=True)
class Verdict:
    """A criterion once it is measured. values: by seed."""

    what: str
    values: tuple[float, ...]
    median: float
    bound: str
    passed: bool


@dataclass(frozen=True)
class Reproduction:
    """A paper's headline result in miniature.

    paper: authors and year. claim: the result with its figure as printed, or from which secondary source it is known.
    miniature: what is tried here, in one sentence or two. run: takes a seed. plot: draws what all seeds gave on a
    figure of matplotlib. criteria: all must pass. note: what a reader must know of a result, such as why it is short.
    """

    title: str
    paper: str
    claim: str
    miniature: str
    run: Callable[[int], Figures]
    plot: Callable[[Any, Sequence[Figures]], None]
    criteria: Sequence[Criterion]
    note: str = ""


def main(reproduction: Reproduction) -> None:
    """Try the seeds, print the verdicts, and write the result and the plot of the script that calls this."""
    import __main__

    parser = argparse.ArgumentParser(description=reproduction.title)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="others than 0 1 2 write no result")
    parser.add_argument("--resume", action="store_true", help="take what seeds gave before, if the script is the same")
    arguments = parser.parse_args()
    script = Path(str(__main__.__file__))
    torch.set_num_threads(1)
    runs, seconds = [], []
    for seed in arguments.seeds:
        figures, took = _try(reproduction, script, seed, arguments.resume)
        runs.append(figures)
        seconds.append(took)
    result = as_result(reproduction, runs, seconds) | {"script": version(script)}
    print("\n".join(told(script.stem, result)))
    if tuple(arguments.seeds) == SEEDS:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{script.stem}.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(reproduction, runs, RESULTS / f"{script.stem}.png")


def _try(reproduction: Reproduction, script: Path, seed: int, resume: bool) -> tuple[Figures, float]:
    """Run one seed, or read what it gave before. Returns its figures and the seconds that it took."""
    kept = KEPT / f"{script.stem}-{seed}-{version(script)}.json"
    if resume and kept.exists():
        before = json.loads(kept.read_text())
        return before["figures"], before["seconds"]
    torch.manual_seed(seed)
    started = time.perf_counter()
    figures = reproduction.run(seed)
    seconds = time.perf_counter() - started
    KEPT.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"figures": figures, "seconds": seconds}))
    return figures, seconds


def version(script: Path) -> str:
    """Give a short hash of what a script does and says, whatever its lines and comments."""
    return hashlib.sha256(ast.dump(ast.parse(script.read_text())).encode()).hexdigest()[:12]


def as_result(reproduction: Reproduction, runs: Sequence[Figures], seconds: Sequence[float]) -> dict[str, Any]:
    """Judge what the seeds gave. Returns what the JSON holds; `passed` is whether every criterion passes."""
    verdicts = [criterion.judge(runs) for criterion in reproduction.criteria]
    return {
        "title": reproduction.title, "paper": reproduction.paper, "claim": reproduction.claim,
        "miniature": reproduction.miniature, "note": reproduction.note,
        "passed": all(verdict.passed for verdict in verdicts),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "seconds": [round(each, 1) for each in seconds], "threads": torch.get_num_threads(),
        "processor": processor(), "python": platform.python_version(), "torch": torch.__version__,
    }


def told(name: str, result: Mapping[str, Any]) -> list[str]:
    """Put a result into lines for a terminal."""
    lines = [f"{name}: {'pass' if result['passed'] else 'short'} ({result['paper']})", f"  claim: {result['claim']}",
             f"  miniature: {result['miniature']}"]
    for verdict in result["verdicts"]:
        values = ", ".join(f"{value:.4g}" for value in verdict["values"])
        lines.append(f"  {'pass ' if verdict['passed'] else 'short'} {verdict['what']}: {verdict['median']:.4g}, "
                     f"bound {verdict['bound']} (by seed {values})")
    return [*lines, "  seconds: " + ", ".join(f"{each:.0f}" for each in result["seconds"])]


def draw(reproduction: Reproduction, runs: Sequence[Figures], path: Path) -> None:
    """Write the plot, small enough for a repository."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    reproduction.plot(figure, runs)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def processor() -> str:
    """Name the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_page(folder: Path = RESULTS, page: Path = PAGE, scripts: Sequence[str] = ()) -> None:
    """Write the page of all results in the folder: a table, then each claim with its figures and its plot.

    scripts: all that there are; the page says which of them have no result.
    """
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    passed = sum(result["passed"] for result in results.values())
    lines = [
        "# Papers reproduced in miniature", "",
        "Each row is a headline result of a paper, made small enough for one core and a few minutes, on the code that "
        "users run. Seeds 0, 1 and 2; the median counts. Bounds were written down before, and nothing was tuned on "
        "these seeds.",
        "", "```sh", "python tools/reproduce/all.py           # all of them, two at a time, and this page",
        "python tools/reproduce/all.py switch    # one of them, and this page", "```", "",
        f"**{passed} of {len(results)} keep all their bounds.**" + _missing(set(scripts) - set(results)), "",
        "| paper | claim | miniature | figures: median (bound) | result | seconds a seed | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        figures = "<br>".join(
            f"{verdict['what']}: {verdict['median']:.4g} ({verdict['bound']})"
            + ("" if verdict["passed"] else " **short**") for verdict in result["verdicts"])
        lines.append(f"| [{result['title']}](#{name.replace('_', '-')}) ({result['paper']}) | {result['claim']} | "
                     f"{result['miniature']} | {figures} | {'pass' if result['passed'] else '**short**'} | "
                     f"{statistics.median(result['seconds']):.0f} | `python tools/reproduce/{name}.py` |")
    for name, result in results.items():
        lines += ["", f'<a id="{name.replace("_", "-")}"></a>', f"## {result['title']}", "",
                  f"{result['paper']}. **{'Pass' if result['passed'] else 'Short'}.** {result['note']}".rstrip(), "",
                  f"![{result['title']}](reproduced/{name}.png)", "",
                  "| criterion | median | by seed | bound | |", "|---|---|---|---|---|"]
        for verdict in result["verdicts"]:
            values = ", ".join(f"{value:.4g}" for value in verdict["values"])
            lines.append(f"| {verdict['what']} | {verdict['median']:.4g} | {values} | {verdict['bound']} | "
                         f"{'pass' if verdict['passed'] else '**short**'} |")
        lines += ["", f"Seconds by seed: {', '.join(map(str, result['seconds']))}, {result['threads']} thread of "
                  f"{result['processor']}, Python {result['python']}, torch {result['torch']}."
                  + _since(name, result)]
    page.write_text("\n".join(lines) + "\n")


def _missing(names: set[str]) -> str:
    return f" No three seeds have been tried yet of {', '.join(sorted(names))}." if names else ""


def _since(name: str, result: Mapping[str, Any]) -> str:
    script = Path(__file__).parent / f"{name}.py"
    same = not script.exists() or result.get("script", version(script)) == version(script)
    return "" if same else " The script has changed since."
