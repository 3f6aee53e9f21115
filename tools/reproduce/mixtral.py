"""Mixtral: nothing is dropped, neighbours share experts, and a rolling cache decodes as the whole forward pass does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from frame import ROOT, Criterion, Figures, Reproduction, main
from training import Trainer, smooth, text_batches, train

from moescale.config import load_config
from moescale.engine.base import Choices
from moescale.moe.routers.base import Capacity
from moescale.planner.count import count_parameters

LAYERS, EXPERTS, BATCH, LENGTH, STEPS, WINDOW = 4, 8, 16, 64, 300, 16
KEYS: dict[str, Any] = {
    "model": {"d_model": 64, "num_layers": LAYERS},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rope_theta": 1e6},
    "moe": {"router": "mixtral", "num_experts": EXPERTS, "top_k": 2, "d_ff": 128, "load_balance_coefficient": 0.01},
    "optim": {"lr": 2e-3},
}


def run(seed: int) -> Figures:
    figures: Figures = {}
    for name in ("dropless", "capacity"):
        trainer = Trainer(KEYS, seed, row_documents=BATCH)
        routers = [mixture.router for mixture in trainer.engine.mixtures.values()]
        if name == "capacity":
            for router in routers:
                router.capacity, router.drops_nothing = Capacity(factor=1.0, eval_factor=1.0), False
        dropped: list[float] = []

        def watch(trainer: Trainer, dropped: list[float] = dropped) -> None:
            layers = trainer.engine.routing().layers.values()
            dropped.append(max(layer.dropped / layer.wanted for layer in layers))

        figures[f"loss {name}"] = smooth(train(trainer, text_batches(seed, BATCH, LENGTH), STEPS, watch), 50)
        figures[f"dropped {name}"] = dropped
        if name == "dropless":
            figures |= repetition(trainer, seed) | counts(trainer) | decoding(trainer, seed)
    return figures


def repetition(trainer: Trainer, seed: int) -> Figures:
    """Measure, layer by layer on held-out text, how often neighbours share their first choice, and any of both."""
    first, either = [0.0] * LAYERS, [0.0] * LAYERS
    batches = list(islice(text_batches(seed, BATCH, LENGTH, held_out=True), 8))

    def see(choices: Choices) -> None:
        expert = choices.expert.view(BATCH, LENGTH, 2)  # the best one first
        here, there = expert[:, 1:], expert[:, :-1]
        first[choices.layer] += float((here[..., 0] == there[..., 0]).float().mean()) / len(batches)
        shared = (here.unsqueeze(-1) == there.unsqueeze(-2)).flatten(-2).any(-1)
        either[choices.layer] += float(shared.float().mean()) / len(batches)

    with trainer.engine.record(training=False, choices=see):
        figures: Figures = {"held out": trainer.evaluate(batches)}
    return figures | {"first": first, "either": either}


def counts(trainer: Trainer) -> Figures:
    """Compare the counts by formula with the tensors of this model, and count Mixtral 8x7B."""
    count, tensors = count_parameters(trainer.config), trainer.engine.parameters()
    total = sum(tensor.numel() for tensor in tensors.values())
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    whole = count_parameters(load_config(ROOT / "configs" / "mixtral_8x7b.yaml"))
    return {"miscounted": abs(count.total - total) + abs(count.active - (total - experts + experts * 2 // EXPERTS)),
            "total": round(whole.total / 1e9, 2), "active": round(whole.active / 1e9, 2)}


@torch.no_grad()
def decoding(trainer: Trainer, seed: int) -> Figures:
    """Decode token by token with a cache that rolls over a window of 16, beside the whole forward pass."""
    windowed = Trainer({**KEYS, "attention": {**KEYS["attention"], "window": WINDOW}}, seed)
    model = windowed.engine.model
    model.load_state_dict(trainer.engine.model.state_dict())
    tokens = next(text_batches(seed, 4, 3 * WINDOW, held_out=True))[:, :-1]
    whole = model.logits(tokens)
    model.eval()
    states, worst = model.new_states(len(tokens), tokens.shape[1]), 0.0
    assert states[0].num_bytes() == model.new_states(len(tokens), WINDOW)[0].num_bytes(), "the cache does not roll"
    for index in range(tokens.shape[1]):
        position = torch.full((len(tokens), 1), index)
        scores = model.next_scores(tokens[:, index : index + 1], position, position, states)
        worst = max(worst, float((scores - whole[:, index]).abs().max()))
    return {"decoding": worst}


def plot(figure: Any, runs: Sequence[Figures]) -> None:
    left, right = figure.subplots(1, 2)
    for index, figures in enumerate(runs):
        for key, color, label in (("first", "tab:blue", "the first choice"), ("either", "tab:orange", "any of both")):
            left.plot(range(LAYERS), figures[key], marker="o", color=color, label=label if not index else None)
    left.axhline(1 / EXPERTS, color="tab:blue", linestyle=":")
    left.axhline(1 - 6 / 8 * 5 / 7, color="tab:orange", linestyle=":")
    left.set(xlabel="layer", ylabel="share of neighbours", title="neighbours that share (dotted: at random)",
             ylim=(0, 1), xticks=range(LAYERS))
    left.legend()
    for name, color in (("dropless", "tab:blue"), ("capacity", "tab:gray")):
        for index, figures in enumerate(runs):
            right.plot(figures[f"loss {name}"], color=color, linewidth=1,
                       label=("dropless" if name == "dropless" else "capacity factor 1") if not index else None)
    right.set(xlabel="step", ylabel="cross entropy (nats)", title="three seeds")
    right.legend()


REPRODUCTION = Reproduction(
    title="Mixtral of Experts",
    paper="Jiang et al., 2024",
    claim="8x7B has 47 billion parameters and uses 13 of them; at layer 15 consecutive tokens share their first expert "
          "in 23.6 to 28.4 % (at random 12.5 %) and one of both in 61.6 to 67.0 % (46 %)",
    miniature="four layers of 64 features with 8 experts of 128, two per token, on library source, Adam 2e-3, 300 "
              "steps of 16 x 64, dropless and with capacity factor 1 over the 1,024 tokens of a step; neighbours on "
              "held-out text; decoding 48 tokens with a cache of 16",
    run=run,
    plot=plot,
    criteria=(
        Criterion("dropped in any step, dropless", lambda figures: max(figures["dropped dropless"]), equals=0),
        Criterion("dropped at capacity factor 1, worst layer, last 50 steps",
                  lambda figures: sum(figures["dropped capacity"][-50:]) / 50, at_least=0.05),
        Criterion("neighbours that share the first choice, best layer", lambda figures: max(figures["first"]),
                  at_least=0.17),
        Criterion("and any of both", lambda figures: max(figures["either"]), at_least=0.52),
        Criterion("parameters that formulas and tensors disagree on", lambda figures: figures["miscounted"], equals=0),
        Criterion("billions of parameters of 8x7B", lambda figures: figures["total"], equals=46.70),
        Criterion("of which a token uses", lambda figures: figures["active"], equals=12.88),
        Criterion("difference of logits, rolling cache", lambda figures: figures["decoding"], at_most=1e-4),
    ),
)

if __name__ == "__main__":
    main(REPRODUCTION)
