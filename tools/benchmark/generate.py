"""The time that a generated token takes, beside the full forward over its context, in alternation.

    python tools/benchmark/generate.py [--threads 1] [--rounds 15] [--contexts 256 1024 4096] [--batches 1]

The full forward is what a token costs without a state: all of the context anew, the head on every position. The
prefill is what reading the context once takes. `state` is what all layers keep of it. Prints a table of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table

from moescale.config import parse_config
from moescale.model.build import build_model
from moescale.model.generation import Sampling, next_tokens
from moescale.model.initialize import initialize
from moescale.model.language_model import LanguageModel
from moescale.spec.model import describe

MODEL = {"vocab_size": 1024, "d_model": 256, "num_layers": 4}
ATTENTION = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 32}
MOE = {"num_experts": 8, "top_k": 2, "d_ff": 512}
WINDOW, STEPS = 128, 8  # steps to a round


def make_model(compute: str, window: int | None) -> LanguageModel:
    config = parse_config({"model": MODEL, "attention": {**ATTENTION, "window": window}, "moe": MOE,
                           "precision": {"compute": compute}}, "benchmark").for_world(1)
    model = build_model(config, "cpu")
    initialize(model, describe(config), 0)
    return model.eval()


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def measure(model: LanguageModel, batch: int, context: int, rounds: int) -> list[str]:
    """Return the columns of a row: full forward and prefill, a step, their ratio, tokens a second, and the state."""
    tokens = torch.randint(MODEL["vocab_size"], (batch, context), generator=torch.Generator().manual_seed(0))
    steps: Iterator[object] = next_tokens(
        model, tokens.tolist(), rounds * STEPS + STEPS + 1, sampling=Sampling())
    prefill = milliseconds(lambda: next(steps))
    full, step = [], []
    for number in range(rounds + 1):
        whole = milliseconds(lambda: model.logits(tokens))
        each = [milliseconds(lambda: next(steps)) for _ in range(STEPS)]
        if number:  # the first round warms up
            full.append(whole)
            step += each
    before, now = statistics.median(full), statistics.median(step)
    kept = sum(state.num_bytes() for state in model.new_states(batch, context))
    return [str(batch), f"{context:,}", f"{before:.1f}", f"{prefill:.0f}", f"{now:.2f}", f"{before / now:.0f}",
            f"{1e3 * batch / now:,.0f}", f"{kept / 1e6:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("compute", "window", "batch", "context", "full forward, ms", "prefill, ms", "a step, ms",
                  "times faster", "tokens a second", "state, MB",
                  title=f"a generated token, {arguments.threads} threads, medians")
    for compute in ("float32", "bfloat16"):
        for window in (None, WINDOW):
            model = make_model(compute, window)
            for batch in arguments.batches:
                for context in arguments.contexts:
                    table.add_row(compute, str(window), *measure(model, batch, context, arguments.rounds))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
