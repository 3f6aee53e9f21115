"""Every layout of 8 ranks, of four families of models, proven by `moescale verify`; hours on two cores.

    python tools/benchmark/layouts.py [--minutes 30] [--summary]

Goes through them in random order and writes one line a layout to tools/benchmark/results/layouts_8_ranks.jsonl. Started
again, it goes on with those that are not there yet. Prints how many are proven, and the worst figures.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from moescale.config import load_config
from moescale.verify.candidates import Layout, every_layout
from moescale.verify.run import LayoutResult, prepare, try_layouts
from moescale.verify.shrink import shrink

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results" / "layouts_8_ranks.jsonl"
FAMILIES = ("mixtral_8x7b", "switch_base", "palm_8b", "quickstart")  # sparse; with capacity; dense; windowed
TOGETHER = 5  # layouts that share one shrunk model and one process's step


def summarize(row: LayoutResult, family: str) -> dict[str, Any]:
    """One line: the worst relative error in each precision, of losses in float64, and the worst scale ratio."""
    line: dict[str, Any] = {"family": family, "layout": str(row.layout), "schedules": list(row.schedules)}
    for (_, compute), figures in row.figures.items():
        errors = [figure.error for figure in figures]
        line[compute] = max([line.get(compute, 0.0), *errors])
        line["scale"] = max([line.get("scale", 0.0), *(abs(figure.scale - 1) for figure in figures)])
        if compute == "float64":
            losses = [figure.error for figure in figures if "loss" in figure.quantity]
            line["losses_float64"] = max([line.get("losses_float64", 0.0), *losses])
    return {**line, "seconds": round(row.seconds, 1), "diagnosis": row.diagnosis}


def run(minutes: float) -> None:
    """Try layouts that have no line yet, until the time is up."""
    done = {(line["family"], line["layout"]) for line in read()}
    work: list[tuple[str, list[Layout]]] = []
    for family in FAMILIES:
        by_stages: dict[int, list[Layout]] = {}  # deeper pipelines need more layers
        for layout in every_layout(load_config(ROOT / f"configs/{family}.yaml"), 8):
            if (family, str(layout)) not in done:
                by_stages.setdefault(layout.pp, []).append(layout)
        for layouts in by_stages.values():
            random.shuffle(layouts)
            work += [(family, layouts[index : index + TOGETHER]) for index in range(0, len(layouts), TOGETHER)]
    random.shuffle(work)
    deadline = time.monotonic() + 60 * minutes
    for family, layouts in work:
        if time.monotonic() > deadline:
            break
        seed = random.randrange(2**31)
        proof = prepare(shrink(load_config(ROOT / f"configs/{family}.yaml"), layouts), seed)
        for row in try_layouts(proof, layouts, 300):
            line = summarize(row, family)
            print(f"{family} {line['layout']}: {line['diagnosis'] or 'ok'}, {line['seconds']} s", flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def report() -> None:
    lines = read()
    for family in FAMILIES:
        own = [line for line in lines if line["family"] == family]
        count = len(every_layout(load_config(ROOT / f"configs/{family}.yaml"), 8))
        print(f"{family}: {sum(not line['diagnosis'] for line in own)} of {count} layouts proven, "
              f"{sum(bool(line['diagnosis']) for line in own)} fall short")
    for key in ("float32", "float64", "losses_float64", "scale"):
        worst = max((line for line in lines if key in line), key=lambda line: line[key])  # one that raised has none
        print(f"worst {key}: {worst[key]:.1e} ({worst['family']} {worst['layout']})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--summary", action="store_true", help="only print what there is")
    arguments = parser.parse_args()
    if not arguments.summary:
        run(arguments.minutes)
    report()


if __name__ == "__main__":
    main()
