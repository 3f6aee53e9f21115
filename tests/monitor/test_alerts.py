"""A run that goes wrong says so within fifty steps, and a healthy one keeps quiet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moescale.config import load_config
from moescale.engine.native import NativeEngine
from moescale.parallel.expert import moe_layers
from moescale.trainer import train

PLANTED = 60


def dead_expert(engine: NativeEngine) -> None:
    moe_layers(engine.model)[1].router.expert_bias[3] = -9


def collapse(engine: NativeEngine) -> None:
    moe_layers(engine.model)[0].router.expert_bias[:2] = 9


def drops(engine: NativeEngine) -> None:
    for layer in moe_layers(engine.model):
        layer.router.dropped = lambda routing, valid: valid.sum() * 2


def spike(engine: NativeEngine) -> None:
    with torch.no_grad():
        engine.model.head.weight.mul_(-1)


@pytest.mark.parametrize(("plants", "words"), [
    ([], []), ([dead_expert, drops], ["dead experts: layer 1, 1 of 4 (3)", "drops: 100%"]),
    ([collapse], ["dead experts: layer 0, 2 of 4 (2, 3)", "collapse: layer 0 uses 2"]), ([spike], ["loss spike: "]),
])
def test_alerts_come_within_fifty_steps(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    plants: list[Callable[[NativeEngine], None]], words: list[str],
) -> None:
    step = NativeEngine.step

    def planted(engine: NativeEngine, guard: torch.Tensor | None = None) -> torch.Tensor:
        for plant in plants if engine.step_count == PLANTED else ():
            plant(engine)
        return step(engine, guard)

    monkeypatch.setattr(NativeEngine, "step", planted)
    train(load_config("tiny.yaml", ["run.steps=120", "monitor.every=10", "checkpoint.every=1000", "optim.lr=2e-3",
                                    "moe.router=sigmoid_bias", "data.global_batch=8"]))
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    alerts = [(line["step"], text) for line in lines for text in line.get("alerts", [])]
    assert len(alerts) == len(words), alerts
    texts = sorted(text for _, text in alerts)
    assert all(text.startswith(word) for text, word in zip(texts, sorted(words), strict=True)), alerts
    assert all(PLANTED < at <= PLANTED + 50 for at, _ in alerts)
    output = capsys.readouterr().out
    assert all(f"step {at}: {text}" in output for at, text in alerts)
