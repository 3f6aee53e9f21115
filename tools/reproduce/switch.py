"""Switch Transformers: with the same FLOPs per token, more experts learn in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from frame import Criterion, Figures, Reproduction, main
from torch import Tensor
from training import Trainer, smooth, steps_to, train

from moescale.moe.routers.base import Capacity
from moescale.moe.routers.token_choice import SwitchRouter

SYMBOLS, NOISE, BATCH, LENGTH, STEPS = 96, 0.1, 64, 64, 800
GROUP = 16  # sequences whose tokens share the slots of the experts
MODEL: dict[str, Any] = {
    "data": {"tokenizer": None},
    "model": {"vocab_size": SYMBOLS, "d_model": 64, "num_layers": 2},
    "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16},
    "optim": {"lr": 3e-3},
}


def memory_task(seed: int) -> Iterator[Tensor]:
    """Draw sequences whose next symbol is a table's entry for the last two, or noise. Yields [BATCH, LENGTH + 1]."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(SYMBOLS, (SYMBOLS, SYMBOLS), generator=generator)
    while True:
        tokens = torch.randint(SYMBOLS, (BATCH, LENGTH + 1), generator=generator)
        noisy = torch.rand(BATCH, LENGTH + 1, generator=generator) < NOISE
        for index in range(2, LENGTH + 1):
            known = table[tokens[:, index - 2], tokens[:, index - 1]]
            tokens[:, index] = torch.where(noisy[:, index], tokens[:, index], known)
        yield tokens


def keys(experts: int) -> dict[str, Any]:
    """Give a run with feed-forwards of 32 hidden features, or with Switch's experts of the same size."""
    if not experts:
        return {**MODEL, "model": {**MODEL["model"], "pattern": [{"channel_mixer": "feed_forward"}]},
                "feed_forward": {"d_ff": 32, "activation": "relu"}}
    return {**MODEL, "moe": {
        "router": "switch", "num_experts": experts, "top_k": 1, "d_ff": 32, "activation": "relu",
        "capacity_factor": 1.25, "load_balance_coefficient": 0.01}}


def run(seed: int) -> Figures:
    figures: Figures = {}
    for experts in (0, 8, 16):
        dropped: list[float] = []

        def watch(trainer: Trainer, dropped: list[float] = dropped) -> None:
            layers = trainer.engine.routing().layers.values()
            dropped.append(sum(layer.dropped for layer in layers) / max(1, sum(layer.wanted for layer in layers)))

        trainer = Trainer(keys(experts), seed, row_documents=GROUP)
        figures[f"loss {experts}"] = smooth(train(trainer, memory_task(seed), STEPS, watch), 50)
        figures[f"dropped {experts}"] = sum(dropped[-100:]) / 100
    return {**figures, **routed_in_bfloat16(seed)}


def routed_in_bfloat16(seed: int) -> Figures:
    """Compare the choices among 512 experts of a bfloat16 product with those of the router on bfloat16 features.

    The router upcasts what it gets, so that it chooses just as a product of the same features in float32 does.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4096, 64, generator=generator).bfloat16()
    router = SwitchRouter(64, 512, 1, left_behind_choices=1, capacity=Capacity(), balance_over="sequence", jitter=0.0,
                          salt=0)
    torch.nn.init.normal_(router.weight, generator=generator)
    with torch.no_grad():
        routing, _ = router(x, torch.arange(4096).view(1, -1))
        exact = (x.float() @ router.weight.T).argmax(-1).flatten()
        rounded = (x @ router.weight.bfloat16().T).argmax(-1).flatten()
    selective = torch.empty_like(exact)
    selective[routing.token] = routing.expert
    return {"moved by bfloat16": int((rounded != exact).sum()), "moved by the router": int((selective != exact).sum())}


def plot(figure: Any, runs: Sequence[Figures]) -> None:
    axes = figure.subplots()
    for experts, color in ((0, "tab:gray"), (8, "tab:blue"), (16, "tab:orange")):
        for index, figures in enumerate(runs):
            axes.plot(figures[f"loss {experts}"], color=color, linewidth=1,
                      label=(f"{experts} experts" if experts else "dense") if index == 0 else None)
    axes.set(xlabel="step", ylabel="loss (nats)", title="the same FLOPs per token, three seeds")
    axes.legend()


REPRODUCTION = Reproduction(
    title="Switch Transformers",
    paper="Fedus, Zoph, Shazeer, 2022",
    claim="at the same FLOPs per token Switch-Base with 64 experts reaches T5-Base's quality in 7.5 times fewer steps; "
          "two experts already help; a router in bfloat16 diverges where selective precision does not (table 2)",
    miniature="the next symbol is a random table's entry for the last two (96 x 96, a tenth noise); two layers of 64 "
              "features, feed-forwards of 32 against Switch layers of 8 and 16 such experts, capacity factor 1.25, "
              "Adam 3e-3, 800 steps of 64 x 64 in groups of 1,024 tokens; a toy router of 512 experts",
    run=run,
    plot=plot,
    criteria=(
        Criterion("dense loss minus that of 8 experts",
                  lambda figures: figures["loss 0"][-1] - figures["loss 8"][-1], at_least=0.2),
        Criterion("loss of 8 experts minus that of 16",
                  lambda figures: figures["loss 8"][-1] - figures["loss 16"][-1], at_least=0.0),
        Criterion("steps of dense to its last loss, over those of 8 experts",
                  lambda figures: STEPS / steps_to(figures["loss 8"], figures["loss 0"][-1]), at_least=1.4),
        Criterion("share dropped in the last 100 steps, 8 experts", lambda figures: figures["dropped 8"], at_most=0.02),
        Criterion("tokens of 4096 that a bfloat16 router sends elsewhere",
                  lambda figures: figures["moved by bfloat16"], at_least=1),
        Criterion("tokens that our router sends elsewhere than float32",
                  lambda figures: figures["moved by the router"], equals=0),
    ),
)

if __name__ == "__main__":
    main(REPRODUCTION)
