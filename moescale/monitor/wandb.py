"""The figures in Weights & Biases, online or into a folder that `wandb sync` sends later."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from moescale.monitor.metrics import Metrics


class Wandb:
    """A sink that opens one run of wandb in the run directory."""

    def __init__(self, run_dir: Path, project: str, mode: Literal["offline", "online"], config: dict[str, Any]) -> None:
        """mode: offline or online. config: shown beside the run."""
        try:
            import wandb
        except ImportError:
            raise ValueError("monitor.wandb needs the package wandb: pip install 'moescale[wandb]', "
                             "or write monitor.wandb=off") from None
        self._bars = lambda counts: wandb.Histogram(np_histogram=(np.array(counts), np.arange(len(counts) + 1)))
        self._run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), mode=mode, config=config)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Metrics) -> None:
        values = {
            key: self._bars(value) if isinstance(value, list) else value for key, value in metrics.items()
        }
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
