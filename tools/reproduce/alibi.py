"""ALiBi: trained on short sequences, a model with linear biases reads long ones as well; others do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from frame import Criterion, Figures, Reproduction, main
from torch import Tensor
from training import TRAINED, Trainer, library_text, smooth, text_batches, train

TRAINED_LENGTH, BATCH, STEPS = 64, 32, 300
LENGTHS = (64, 128, 256, 512, 1024)
HELD_OUT = 128 * 1024  # bytes, the same ones at every length
POSITIONS: dict[str, dict[str, Any]] = {  # keys of a run for each way to tell positions
    "sinusoidal": {"model": {"embedding_positions": "sinusoidal"}, "attention": {"positions": "none"}},
    "rope": {"attention": {"positions": "rope"}},
    "alibi": {"attention": {"positions": "alibi"}},
}


def keys(positions: str) -> dict[str, Any]:
    """Give a run with three layers of 128 features and 8 heads."""
    own = POSITIONS[positions]
    return {
        "model": {"d_model": 128, "num_layers": 3, "pattern": [{"channel_mixer": "feed_forward"}],
                  **own.get("model", {})},
        "attention": {"num_heads": 8, "num_kv_heads": 8, "head_dim": 16, **own["attention"]},
        "feed_forward": {"d_ff": 512, "activation": "gelu"}, "data": {"seq_len": TRAINED_LENGTH},
        "run": {"steps": STEPS}, "optim": {"lr": 2e-3, "schedule": "cosine", "warmup_steps": 0, "final_lr_share": 0.0},
    }


def held_out(length: int) -> Iterator[Tensor]:
    """Cut the held-out text into windows that do not overlap. Yields [documents, length + 1] int64."""
    text = library_text()[int(TRAINED * len(library_text())) :][: HELD_OUT + 1]
    windows = torch.stack([text[first : first + length + 1] for first in range(0, HELD_OUT, length)])
    yield from windows.split(8192 // length)


def run(seed: int) -> Figures:
    figures: Figures = {}
    for positions in POSITIONS:
        trainer = Trainer(keys(positions), seed)
        batches = islice(text_batches(seed, BATCH, TRAINED_LENGTH), STEPS)
        figures[f"curve {positions}"] = smooth(train(trainer, batches, STEPS), 20)
        figures[f"perplexity {positions}"] = [
            float(np.exp(trainer.evaluate(held_out(length)))) for length in LENGTHS]
    return figures


def growth(figures: Figures, positions: str) -> float:
    """Compare the perplexity at 512 with that at the length of training."""
    values = figures[f"perplexity {positions}"]
    return values[LENGTHS.index(512)] / values[0]


def plot(figure: Any, runs: Sequence[Figures]) -> None:
    axes = figure.subplots()
    for positions, color in zip(POSITIONS, ("tab:gray", "tab:orange", "tab:blue"), strict=True):
        for index, figures in enumerate(runs):
            axes.plot(LENGTHS, figures[f"perplexity {positions}"], color=color, marker="o", markersize=3, linewidth=1,
                      label=positions if index == 0 else None)
    axes.axvline(TRAINED_LENGTH, color="black", linewidth=0.5)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="length read (trained at 64)", ylabel="perplexity per byte", title="three seeds")
    axes.legend()


REPRODUCTION = Reproduction(
    title="ALiBi",
    paper="Press, Smith, Lewis, 2022",
    claim="trained at 512, WikiText-103 perplexity falls from 19.73 to 18.40 at 3072, below sinusoidal positions "
          "trained there (18.67); sinusoidal ones last 20 to 50 tokens beyond training, rotary ones 100 to 200",
    miniature="bytes of Python's library, three layers of 128 features, 8 heads, 300 steps of 32 x 64, cosine from "
              "2e-3; the same 131,072 held-out bytes in windows of 64 to 1024 that do not overlap",
    run=run,
    plot=plot,
    criteria=(
        Criterion("ALiBi's perplexity at 512 over that at 64", lambda figures: growth(figures, "alibi"), at_most=1.0),
        Criterion("sinusoidal positions': the same", lambda figures: growth(figures, "sinusoidal"), at_least=1.6),
        Criterion("rotary positions': the same", lambda figures: growth(figures, "rope"), at_least=1.5),
    ),
    note="At the length of training, rotary positions may be better than ALiBi at this size.",
)

if __name__ == "__main__":
    main(REPRODUCTION)
