"""One MoE layer forward and backward beside its peers: the same weights, the same results, in alternation.

    python tools/benchmark/moe.py [--cases coarse fine] [--dtypes float32 bfloat16] [--ranks 1 2] [--contests peers]

Contests: `peers`, this layer beside others over tokens as the router draws them; `routing`, this layer over balanced,
uniform, drawn and one-hot routing; `routers`, this layer with each router. Output and gradients of x, router and
experts are first held to a float64 reference; what is off by more than 1e-5 in float32 or 2e-2 in bfloat16 (norm of
the difference over the norm) is not timed. "drops" is DeepSpeed's layer at its usual capacity factor of 1, which
computes less; its twin without drops is checked. Weights have the compute type, the router float32. On several ranks
each has one thread and its share of the tokens, and a round takes as long as the slowest rank.

Peak: most bytes alive at once beside x, weights and the output's gradient, by the allocator's events under torch's
profiler. Saved: of it, what autograd keeps from forward for backward. Peak over need: the peak by saved bytes and
results (output, gradients of x and of the weights) together. Rows and bytes sent: to other ranks, forward and
backward, a rank's mean; a row goes out and back, and so does its gradient.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch
from moe_cases import CASES, ROUTINGS, Case
from moe_measure import Entry, Figures, on_ranks
from moe_peers import ON_RANKS, PEERS
from rich.console import Console
from rich.table import Table

from moescale.moe.routers import ROUTERS

RESULTS = Path(__file__).parent / "results"
CONTESTS = ("peers", "routing", "routers")
Result = tuple[str, list[tuple[str, Figures]]]


def entries_of(contest: str, ranks: int, peers: list[str], routing: str) -> list[Entry]:
    if contest == "routing":
        return [Entry("moescale", name) for name in ROUTINGS]
    if contest == "routers":
        return [Entry(f"moescale, {name}", routing) for name in ROUTERS]
    return [Entry(name, routing) for name in PEERS if name in peers and (ranks == 1 or name in ON_RANKS)]


def merge(by_rank: list[Figures]) -> Figures:
    """The slowest rank's seconds in each round, the worst error, the greatest peak; the mean of bytes sent."""
    errors = [figures.error for figures in by_rank if figures.error is not None]
    heaviest = max(by_rank, key=lambda figures: figures.peak_bytes)
    rounds = zip(*(figures.seconds for figures in by_rank), strict=True)
    return Figures(
        max(errors) if errors else None, heaviest.peak_bytes, heaviest.saved_bytes, heaviest.result_bytes,
        sum(figures.sent_bytes for figures in by_rank) // len(by_rank),
        [max(seconds) for seconds in rounds],
    )


def tabulate(title: str, unit: str, case: Case, size: int, contest: list[tuple[str, Figures]]) -> Table:
    table = Table("layer", f"median {unit}", "times ours", "worst error", "sent rows", "sent MB", "peak MB", "saved MB",
                  "peak / need", title=title)
    ours = statistics.median(contest[0][1].seconds) if contest[0][1].seconds else float("nan")
    for label, figures in contest:
        error = "" if figures.error is None else "{:.1e} {}".format(*figures.error)
        if not figures.seconds:
            table.add_row(label, "differs", "", error)
            continue
        median = statistics.median(figures.seconds)
        need = figures.saved_bytes + figures.result_bytes
        table.add_row(
            label, f"{1000 * median:.0f}", f"{median / ours:.2f}", error,
            f"{figures.sent_bytes / (4 * case.d_model * size):,.0f}", f"{figures.sent_bytes / 1e6:.1f}",
            f"{figures.peak_bytes / 1e6:.0f}", f"{figures.saved_bytes / 1e6:.0f}", f"{figures.peak_bytes / need:.2f}",
        )
    return table


def plot(results: list[Result], path: Path) -> None:
    """One panel a contest: bars of medians, the quickest and the slowest round as a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(results), 1, figsize=(8, 0.8 + 2.6 * len(results)), squeeze=False)
    for panel, (title, contest) in zip(panels[:, 0], results, strict=True):
        timed = [(label, figures.seconds) for label, figures in contest if figures.seconds][::-1]
        medians = [1000 * statistics.median(seconds) for _, seconds in timed]
        spread = [[median - 1000 * min(seconds) for median, (_, seconds) in zip(medians, timed, strict=True)],
                  [1000 * max(seconds) - median for median, (_, seconds) in zip(medians, timed, strict=True)]]
        colours = ["tab:orange" if label.startswith("moescale") else "tab:grey" for label, _ in timed]
        panel.barh([label for label, _ in timed], medians, xerr=spread, color=colours, ecolor="black")
        panel.set(title=title, xlabel="milliseconds, forward and backward")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["coarse", "fine"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--ranks", nargs="+", type=int, choices=[1, 2, 4], default=[1])
    parser.add_argument("--contests", nargs="+", choices=CONTESTS, default=["peers"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--routing", choices=ROUTINGS, default="drawn", help="of the contests peers and routers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="on one rank")
    parser.add_argument("--cpu-time", action="store_true",
                        help="processor time, which others on the machine hardly disturb; only fair on one thread")
    parser.add_argument("--name", default="moe", help="of the files in results/")
    arguments = parser.parse_args()
    results: list[Result] = []
    # DeepSpeed builds an extension on first use: in a folder of this run alone, no lock of another run is waited for
    with tempfile.TemporaryDirectory() as folder, (RESULTS / f"{arguments.name}.txt").open("w") as file:
        os.environ["TORCH_EXTENSIONS_DIR"] = folder
        for ranks, contest, name, dtype in (
            (ranks, contest, name, dtype) for ranks in arguments.ranks for contest in arguments.contests
            for name in arguments.cases for dtype in arguments.dtypes
        ):
            entries = entries_of(contest, ranks, ["moescale", *arguments.peers], arguments.routing)
            by_rank = on_ranks(
                ranks, CASES[name], getattr(torch, dtype), entries, arguments.rounds,
                arguments.threads if ranks == 1 else 1, arguments.cpu_time,
            )
            merged = [merge(list(of_entry)) for of_entry in zip(*by_rank, strict=True)]
            labels = [entry.routing if contest == "routing" else entry.peer for entry in entries]
            title = f"{name}, {dtype}, {contest}, {ranks} rank{'s' * (ranks > 1)}"
            results.append((title, list(zip(labels, merged, strict=True))))
            unit = "CPU ms" if arguments.cpu_time else "ms"
            table = tabulate(title, unit, CASES[name], getattr(torch, dtype).itemsize, results[-1][1])
            for console in (Console(width=120), Console(width=120, file=file)):
                console.print(table)
    plot(results, RESULTS / f"{arguments.name}.png")


if __name__ == "__main__":
    main()
