"""State and time of a step of each optimizer, beside transformers' Adafactor, on the weights of one model.

    python tools/benchmark/optimizer.py [--config configs/quickstart.yaml] [KEY=VALUE ...] [--rounds 7]

Optimizers take turns. Prints bytes of state for each parameter, and the median of the milliseconds of a step, of the
processor's time, all threads together: other programs add little to it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from moescale.config import load_config, parse_config
from moescale.model.build import build_model
from moescale.model.initialize import initialize
from moescale.optim.optimizer import build_optimizer
from moescale.spec.model import describe

FORMS: dict[str, dict[str, object]] = {
    "AdamW": {"name": "adamw"},
    "AdamW, moments in bfloat16": {"name": "adamw", "moments": "bfloat16"},
    "Adafactor": {"name": "adafactor"},
    "Adafactor, momentum": {"name": "adafactor", "momentum": 0.9},
    "Adafactor, PaLM's": {"name": "adafactor", "factored": False, "momentum": 0.9},
}
PEERS = {"transformers' Adafactor": None, "transformers' Adafactor, momentum": 0.9}


def make_steps(path: Path, overrides: list[str]) -> dict[str, tuple[torch.optim.Optimizer, nn.Module]]:
    """Give each optimizer the same model, with gradients."""
    config = load_config(path, overrides)
    made: dict[str, tuple[torch.optim.Optimizer, nn.Module]] = {}
    for name in (*FORMS, *PEERS):
        model = build_model(config, "cpu")
        initialize(model, describe(config), seed=0)
        if name in FORMS:
            optim = parse_config({"optim": FORMS[name]}, "benchmark").optim
            optimizer = build_optimizer(model, describe(config), optim)
        else:
            from transformers.optimization import Adafactor

            optimizer = Adafactor(model.parameters(), lr=1e-3, beta1=PEERS[name], scale_parameter=True,
                                  relative_step=False)
        made[name] = (optimizer, model)
    return made


def timed(optimizer: torch.optim.Optimizer, gradients: Callable[[], None]) -> float:
    """Take a step on fresh gradients. Returns its milliseconds."""
    gradients()
    begin = time.process_time()
    optimizer.step()
    return 1000 * (time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    steps = make_steps(arguments.config, arguments.overrides)
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    torch.manual_seed(0)
    for number in range(arguments.rounds + 1):
        for name, (optimizer, model) in steps.items():
            def draw(model: nn.Module = model) -> None:
                for parameter in model.parameters():
                    parameter.grad = torch.randn_like(parameter)

            elapsed = timed(optimizer, draw)
            if number:  # the first step makes the peers' state
                milliseconds[name].append(elapsed)
    size = sum(parameter.numel() for parameter in next(iter(steps.values()))[1].parameters())
    print(f"{size / 1e6:.1f}M parameters, {torch.get_num_threads()} threads")
    for name, (optimizer, _) in steps.items():
        kept = sum(tensor.numel() * tensor.element_size() for state in optimizer.state.values()
                   for tensor in state.values() if isinstance(tensor, torch.Tensor))
        print(f"{name:36} {kept / size:7.3f} bytes a parameter  {statistics.median(milliseconds[name]):8.1f} ms")


if __name__ == "__main__":
    main()
