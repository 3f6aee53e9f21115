"""Run directories whose figures and texts are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from moescale.record.held_out import SHOWN_TOKENS, HeldOutRouting

TEXT = "def f(x):\n    return x1 + 42  "


def make_run(run: Path, *, layers: int, experts: int, steps: int, dead: int = 1) -> Path:
    """A run of which the loads are known: expert e of layer l has e + l + s % 2 rows, expert `dead` of layer 0 none."""
    run.mkdir()
    config = {"run": {"steps": 10 * steps}, "model": {"num_layers": layers}, "moe": {"num_experts": experts},
              "parallel": {"dp_shard": 2, "ep": 2}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for step in range(1, steps + 1):
        line = {"step": 10 * step, "loss": 3 / step, "tokens_per_second": 1000.0, "moe/max_load": 2.0,
                "moe/min_load": 0.0, "moe/dropped_share": 0.0, "moe/bytes_sent": 1e6,
                "moe/rows_between_ranks": [[5, 7], [11, 13]]}
        for layer in range(layers):
            load = [expert + layer + step % 2 + 1 for expert in range(experts)]
            load[dead] *= layer > 0
            line[f"moe/layer_{layer:02d}/tokens_per_expert"] = load
        lines.append(json.dumps(line))
    lines[-1] = lines[-1][:-1] + ', "alerts": ["dead experts: layer 0, <1> of 4"]}'
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "lo')  # it is being written
    return run


def make_text(run: Path, layers: int, experts: int, times: int = 1) -> HeldOutRouting:
    rng = np.random.default_rng(1)
    pieces = np.array([*TEXT, "\n", "x", *TEXT, "", "", *TEXT, "\n", "x"] * times)
    expert = np.stack([[rng.permutation(experts)[:2] for _ in pieces] for _ in range(layers)]).astype(np.int16)
    expert[:, pieces == ""] = -1
    kinds = np.array(["", ".py", ".md"])[np.where(pieces == "", 0, 1 + (np.arange(len(pieces)) >= len(TEXT) + 2))]
    probabilities = rng.dirichlet(np.ones(experts), (layers, len(pieces))).astype(np.float16)
    likely = (-probabilities).argsort(-1)[..., :8].astype(np.int16)
    likely[:, pieces == ""] = -1
    likely = likely[:, :SHOWN_TOKENS]
    routing = HeldOutRouting(50, np.arange(layers), len(TEXT) + 2, pieces, kinds, expert,
                             rng.random(expert.shape, np.float32), likely,
                             np.take_along_axis(probabilities[:, :SHOWN_TOKENS], likely, -1))
    routing.save(run)
    return routing
