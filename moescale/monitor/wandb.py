"""The figures in Weights & Biases, online or into a folder that `wandb sync` sends later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moescale.monitor.metrics import Metrics
from moescale.monitor.routing import values

MAX_KEYS = 200
OF_LAYERS = ("max_load", "entropy", "dropped_share")  # curves of each layer, as far as there are keys for them


class Wandb:
    """A sink that opens one run of wandb in the run directory, the same one when a run goes on."""

    def __init__(
        self, run_dir: Path, project: str, mode: Literal["auto", "offline", "online"], config: dict[str, Any], *,
        artifacts: bool = False, resumed_from: Path | None = None,
    ) -> None:
        """mode: auto = online where wandb knows a key, otherwise offline. config: shown beside the run.

        artifacts: also keep the configuration, the layout, this package's code, and where each checkpoint lies.
        resumed_from: the checkpoint that the run goes on from.
        """
        try:
            import wandb
        except ImportError:
            raise ValueError("monitor.wandb needs the package wandb: pip install 'moescale[wandb]', "
                             "or write monitor.wandb=off") from None
        self._wandb = wandb
        if mode == "auto":
            mode = "online" if knows_key() else "offline"
        before = sorted((run_dir / "wandb").glob("*run-*-*"))
        self._run = wandb.init(
            project=project, name=run_dir.name, dir=str(run_dir), mode=mode, config=config, resume="allow",
            id=before[-1].name.rpartition("-")[2] if before else None,
        )
        self._run.define_metric("*", step_metric="step")
        self._artifacts = artifacts
        if artifacts:
            self._log_origin(run_dir / "config.yaml", config, resumed_from)
        self._history: list[np.ndarray] = []  # [layers], the load of each layer's busiest expert, step by step

    def write(self, step: int, metrics: Metrics) -> None:
        shown = {key: value for key, value in metrics.items()
                 if isinstance(value, int | float) and not key.startswith("moe/layer_")}
        shown.update(self._pictures(metrics))
        for quantity in OF_LAYERS:
            each = self._of_layers(metrics, quantity)
            if len(shown) + len(each) < MAX_KEYS:
                shown.update({f"moe/layer_{layer:02d}/{quantity.removesuffix('_share')}": value
                              for layer, value in each.items()})
        self._run.log({"step": step, **shown})
        for text in metrics.get("alerts", []):
            self._run.alert(title=text.partition(":")[0], text=f"step {step}: {text}", level="WARN")

    def saved(self, step: int, checkpoint: Path) -> None:
        if self._artifacts:
            self._run.log_artifact(self._checkpoint(checkpoint), aliases=[checkpoint.name])

    def _log_origin(self, config_file: Path, config: dict[str, Any], resumed_from: Path | None) -> None:
        """Say what the run is made of; wandb by itself notes the git commit of the working directory."""
        artifact = self._wandb.Artifact(f"config-{self._run.id}", "config")
        artifact.add_file(str(config_file))
        with artifact.new_file("layout.json") as file:
            json.dump(config.get("parallel", {}), file, indent=2)
        self._run.log_artifact(artifact)
        self._run.log_code(str(Path(__file__).parent.parent), name=f"code-{self._run.id}",
                           include_fn=lambda path: not path.endswith(".pyc"))
        if resumed_from is not None:
            # What `use_artifact` does. It refuses to offline, though a run file can hold it for `wandb sync`.
            self._run._log_artifact(self._checkpoint(resumed_from), aliases=[resumed_from.name], is_user_created=True,
                                    use_after_commit=True)

    def _checkpoint(self, checkpoint: Path) -> Any:
        """-> an artifact that holds where each file lies, and no weights; the same one each time for the same folder"""
        artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", "model")
        artifact.add_reference(checkpoint.resolve().as_uri(), checksum=False)  # which would read all the weights
        return artifact

    def close(self) -> None:
        self._run.finish()

    def _of_layers(self, metrics: Metrics, quantity: str) -> dict[int, float]:
        if quantity != "max_load":
            return values(metrics, quantity)
        return {layer: max(counts) * len(counts) / max(1, sum(counts))
                for layer, counts in values(metrics, "tokens_per_expert").items()}

    def _pictures(self, metrics: Metrics) -> dict[str, Any]:
        """Maps and histograms of all experts, under keys whose number does not grow with the model."""
        counts = np.array(list(values(metrics, "tokens_per_expert").values()), dtype=float)
        if not counts.size:
            return {}
        load = counts / np.maximum(counts.mean(1, keepdims=True), 1e-9)  # [layers, experts]
        self._history.append(load.max(1))
        history = np.stack(self._history[:: -(-len(self._history) // 400)], axis=1)  # [layers, steps]
        pictures = {
            "moe/load_map": self._wandb.Image(_picture(load), caption="load over the mean: layers down, experts"),
            "moe/load_history": self._wandb.Image(_picture(history), caption="busiest expert: layers down, time"),
            "moe/load_histogram": self._wandb.Histogram(load.flatten().tolist()),
        }
        biases = np.array(list(values(metrics, "expert_bias").values()))
        if biases.size:
            pictures["moe/expert_bias_histogram"] = self._wandb.Histogram(biases.flatten().tolist())
        return pictures


def knows_key() -> bool:
    """Whether wandb could send anything from here."""
    import wandb

    return bool(wandb.api.api_key)


def _picture(load: np.ndarray) -> np.ndarray:
    """Colour loads from blue (a quarter) over white (the mean) to red (four times). -> [height, width, 3] uint8"""
    share = np.clip(np.log2(np.maximum(load, 1e-3)) / 2, -1, 1)[..., None]
    white, blue, red = (np.array(colour) for colour in ((240, 240, 240), (8, 71, 142), (150, 10, 40)))
    colours = np.where(share < 0, white + (white - blue) * share, white + (red - white) * share)
    return colours.round().astype(np.uint8).repeat(12, 0).repeat(max(1, 768 // load.shape[1]), 1)
