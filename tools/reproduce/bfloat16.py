"""BFLOAT16: float32 weights and optimizer with bfloat16 products train as float32 does, and nothing else is needed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import islice
from typing import Any

import ml_dtypes
import numpy as np
import torch
from frame import Criterion, Figures, Reproduction, main
from training import Trainer, smooth, text_batches, train

from moescale.optim.optimizer import build_optimizer
from moescale.spec.model import describe

BATCH, LENGTH, STEPS, RATES = 16, 64, 300, (2e-3, 2e-4)
KINDS = ("float32", "float32 weights, bfloat16 products", "all bfloat16")


def trainer_of(kind: str, rate: float, seed: int) -> Trainer:
    """Make a trainer of a small dense model. With all in bfloat16, weights and moments are rounded as well."""
    trainer = Trainer({
        "model": {"d_model": 64, "num_layers": 2, "pattern": [{"channel_mixer": "feed_forward"}]},
        "feed_forward": {"d_ff": 256, "activation": "gelu"},
        "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16},
        "optim": {"lr": rate, "weight_decay": 0.01},
        "precision": {"compute": "float32" if kind == "float32" else "bfloat16"},
    }, seed)
    if kind == "all bfloat16":
        engine = trainer.engine
        engine.model.bfloat16()
        engine.optimizer = build_optimizer(engine.model, describe(trainer.config), trainer.config.optim)
    return trainer


def run(seed: int) -> Figures:
    figures: Figures = {"scalers": 0}
    held_out = list(islice(text_batches(seed, BATCH, LENGTH, held_out=True), 16))
    for rate in RATES:
        for kind in KINDS:
            trainer = trainer_of(kind, rate, seed)
            figures[f"loss {kind} {rate}"] = smooth(train(trainer, text_batches(seed, BATCH, LENGTH), STEPS))
            figures[f"held out {kind} {rate}"] = trainer.evaluate(held_out)
            figures["scalers"] += sum(issubclass(type(each), torch.amp.GradScaler) for each in gc.get_objects())
    return figures | {"rounding": misrounded(seed)}


def misrounded(seed: int) -> int:
    """Count floats that torch, ml_dtypes and the study's formula do not round alike, to the nearest, ties to even.

    All 65,536 upper halves, each with lower halves below, at and above the tie, and a million random floats; what is no
    number must stay so.
    """
    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    random = np.random.default_rng(seed).integers(0, 2**32, 10**6, dtype=np.uint32)
    bits = np.concatenate(((upper | lower).ravel(), random))
    floats = bits.view(np.float32)
    ours = torch.from_numpy(floats.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    with np.errstate(invalid="ignore"):  # what is no number
        theirs = floats.astype(ml_dtypes.bfloat16).view(np.uint16)
    formula = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    number = ~np.isnan(floats)
    kept_nan = np.isnan(ours[~number].view(ml_dtypes.bfloat16).astype(np.float32))
    return int(((ours != theirs) | (ours != formula))[number].sum() + (~kept_nan).sum())


def gap(figures: Figures, kind: str, rate: float) -> float:
    """Subtract float32's held-out loss from that of another kind."""
    return figures[f"held out {kind} {rate}"] - figures[f"held out float32 {rate}"]


def plot(figure: Any, runs: Sequence[Figures]) -> None:
    for axes, rate in zip(figure.subplots(1, 2), RATES, strict=True):
        for kind, color, width in zip(KINDS, ("tab:gray", "tab:blue", "tab:red"), (3, 1, 1), strict=True):
            axes.plot(runs[0][f"loss {kind} {rate}"], color=color, linewidth=width, label=kind)
        axes.set(xlabel="step", ylabel="loss (nats)", title=f"learning rate {rate:g}, seed 0")
        axes.legend(fontsize="small")


REPRODUCTION = Reproduction(
    title="A study of BFLOAT16",
    paper="Kalamkar et al., 2019",
    claim="training in bfloat16 with float32 accumulation and float32 weights in the optimizer reaches float32's "
          "results in as many steps, without scaling the loss or changing a hyper-parameter (abstract)",
    miniature="a two-layer dense model of 64 features on library source, 300 AdamW steps of 16 x 64 on the same "
              "batches: float32, our mixed precision, and weights and moments rounded to bfloat16 too; learning rates "
              "2e-3 and 2e-4; rounding by torch, ml_dtypes and the formula on 1.4 million floats",
    run=run,
    plot=plot,
    criteria=(
        Criterion("held-out loss of mixed precision, off float32's, rate 2e-3",
                  lambda figures: abs(gap(figures, KINDS[1], 2e-3)), at_most=0.01),
        Criterion("and at rate 2e-4", lambda figures: abs(gap(figures, KINDS[1], 2e-4)), at_most=0.01),
        Criterion("all bfloat16 worse than float32 at rate 2e-4", lambda figures: gap(figures, KINDS[2], 2e-4),
                  at_least=0.1),
        Criterion("objects that scale the loss", lambda figures: figures["scalers"], equals=0),
        Criterion("floats that are not rounded alike", lambda figures: figures["rounding"], equals=0),
    ),
    note="docs/precision.md says in which precision each tensor of a step is; a test asks every one.",
)

if __name__ == "__main__":
    main(REPRODUCTION)
