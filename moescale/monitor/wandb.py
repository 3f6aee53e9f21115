"""The figures in Weights & Biases, online or into a folder that `wandb sync` sends later."""

from __future__ import annotations

import json
import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moescale.files.reading import read_json
from moescale.files.writing import replace_text
from moescale.record.figures import Line, by_layer, of_all, of_layer, parse
from moescale.record.metrics import FILE

Mode = Literal["auto", "offline", "online"]
MAX_KEYS = 200
SECONDS_TO_OPEN, SECONDS_TO_CLOSE = 30, 60  # that a run waits for wandb at most
MOST_WAITING = 1000  # logged steps
OF_LAYERS = ("max_load", "entropy", "dropped_share")  # curves of each layer, as far as there are keys for them


class Wandb:
    """A sink that opens one run of wandb in the run directory, the same one when a run goes on.

    It is a view of a run, and never ends or delays one: a thread does all that wandb is asked for, and what fails is
    said in one line. Each step is sent once. Where a run goes on from a checkpoint before steps that were sent, those
    stay as they are there, since wandb takes nothing back.
    """

    def __init__(
        self, run_dir: Path, project: str, mode: Mode, config: dict[str, Any], *,
        artifacts: bool = False, resumed_from: Path | None = None, say: Callable[[str], None] = print,
    ) -> None:
        """mode: auto = online where wandb knows a key, otherwise offline. config: shown beside the run.

        artifacts: also keep the configuration, the layout, this package's code, and where each checkpoint lies.
        resumed_from: the checkpoint that the run goes on from; without one this is another run. say: takes a line.
        """
        try:
            import wandb
        except ImportError:
            raise ValueError("monitor.wandb needs the package wandb: pip install -e '.[wandb]' in MoEScale's "
                             "folder, or write monitor.wandb=off") from None
        self._wandb, self._say, self._artifacts = wandb, say, artifacts
        self._run_dir, self._state_file = run_dir, run_dir / "wandb" / "moescale.json"
        self._state = _read_state(self._state_file) if resumed_from is not None else {}
        self._told = self._skipped = False
        self._history: list[np.ndarray] = []  # [layers], the load of each layer's busiest expert, step by step
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue(MOST_WAITING)
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(project, mode, config, resumed_from), daemon=True)
        self._thread.start()
        self._opened.wait(SECONDS_TO_OPEN + 5)

    def write(self, step: int, metrics: Line) -> None:
        self._ask(lambda: self._log(step, metrics))

    def saved(self, step: int, checkpoint: Path) -> None:
        if self._artifacts:
            self._ask(lambda: self._run.log_artifact(self._checkpoint(checkpoint), aliases=[checkpoint.name]))

    def close(self) -> None:
        self._ask(None)
        self._thread.join(SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            self._complain(f"does not end within {SECONDS_TO_CLOSE} s")
            # Takes back the hook with which wandb would wait for its service when the process ends.
            teardown = threading.Thread(target=_quietly, args=(self._wandb.teardown,), daemon=True)
            teardown.start()
            teardown.join(1)

    def _ask(self, job: Callable[[], object] | None) -> None:
        """Hand on what is to be done, or drop it where too much waits."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._complain("is too slow")

    def _serve(self, project: str, mode: Mode, config: dict[str, Any], resumed_from: Path | None) -> None:
        """Open the run, do what is asked for, and finish; the thread's own."""
        try:
            with self._failures():
                self._open(project, mode, config)
                if self._artifacts:
                    self._log_origin(self._run_dir / "config.yaml", config, resumed_from)
                self._opened.set()
                while (job := self._jobs.get()) is not None:
                    job()
                self._run.finish()
        finally:
            self._opened.set()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Say what failed, and let go of wandb."""
        try:
            yield
        except Exception as error:  # of which wandb, its service and the network have many
            self._complain(_reason(error))
            _quietly(self._wandb.teardown)

    def _open(self, project: str, mode: Mode, config: dict[str, Any]) -> None:
        quiet = self._wandb.Settings(silent=True)
        self._wandb.setup(quiet)
        online = mode != "offline" and knows_key()
        if mode == "online" and not online:  # wandb would ask for it, and wait for an answer
            self._say("wandb has no key here: the run is kept offline; wandb login, then wandb sync, sends it")
        identity = self._state.get("id") or uuid.uuid4().hex[:8]
        begin = partial(self._wandb.init, project=project, name=self._run_dir.name, dir=str(self._run_dir), id=identity,
                        resume="allow", config=config, settings=self._wandb.Settings(init_timeout=SECONDS_TO_OPEN))
        try:
            self._run = begin(mode="online" if online else "offline")
        except Exception as error:
            if not online:
                raise
            self._say(f"wandb cannot be reached ({_reason(error)}): the run is kept offline, for wandb sync")
            _quietly(self._wandb.teardown)  # its service still holds the run
            self._wandb.setup(quiet)
            self._run = begin(mode="offline")
        self._run.define_metric("*", step_metric="step")
        if self._state:
            self._run.config.update(config, allow_val_change=True)
        self._state = {"id": identity, "step": self._state.get("step", 0)}

    def _complain(self, reason: str) -> None:
        if not self._told:
            self._told = True
            self._say(f"wandb: {reason}: it may lack figures, which are all in {self._run_dir}/{FILE}; the run "
                      "goes on")

    def _log(self, step: int, metrics: Line) -> None:
        """Send the figures of one step, unless wandb has some of it already."""
        sent = self._state["step"]
        if step <= sent:
            if not self._skipped:
                self._skipped = True
                self._say(f"wandb has the steps up to {sent} from before, which stay as they are there")
            return
        shown = {key: value for key, value in metrics.items()
                 if isinstance(value, int | float) and parse(key)[1] is None}
        shown.update(self._pictures(metrics))
        for quantity in OF_LAYERS:
            each = self._of_layers(metrics, quantity)
            if len(shown) + len(each) < MAX_KEYS:
                shown.update({of_layer(quantity, layer): value for layer, value in each.items()})
        self._run.log({"step": step, **shown}, step=step)
        for text in metrics.get("alerts", []):
            self._run.alert(title=text.partition(":")[0], text=f"step {step}: {text}", level="WARN")
        self._state["step"] = step
        with suppress(OSError):  # a full disk: a run that goes on may then send steps once more
            replace_text(self._state_file, json.dumps(self._state))

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
        """Make an artifact that lists where each file lies, without weights; one folder gives one artifact."""
        artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", "model")
        artifact.add_reference(checkpoint.resolve().as_uri(), checksum=False)  # which would read all the weights
        return artifact

    def _of_layers(self, metrics: Line, quantity: str) -> dict[int, float]:
        if quantity != "max_load":
            return by_layer(metrics, quantity)
        return {layer: max(counts) * len(counts) / max(1, sum(counts))
                for layer, counts in by_layer(metrics, "tokens_per_expert").items()}

    def _pictures(self, metrics: Line) -> dict[str, Any]:
        """Maps and histograms of all experts, under keys whose number does not grow with the model."""
        counts = np.array(list(by_layer(metrics, "tokens_per_expert").values()), dtype=float)
        if not counts.size:
            return {}
        load = counts / np.maximum(counts.mean(1, keepdims=True), 1e-9)  # [layers, experts]
        self._history.append(load.max(1))
        history = np.stack(self._history[:: -(-len(self._history) // 400)], axis=1)  # [layers, steps]
        pictures = {
            of_all("load_map"): self._wandb.Image(_picture(load), caption="load over the mean: layers down, experts"),
            of_all("load_history"): self._wandb.Image(_picture(history), caption="busiest expert: layers down, time"),
            of_all("load_histogram"): self._wandb.Histogram(load.flatten().tolist()),
        }
        biases = np.array(list(by_layer(metrics, "expert_bias").values()))
        if biases.size:
            pictures[of_all("expert_bias_histogram")] = self._wandb.Histogram(biases.flatten().tolist())
        return pictures


def _read_state(path: Path) -> dict[str, Any]:
    """Read which run wandb has of this directory, and up to which step; of earlier versions its folder says which."""
    try:
        state = read_json(path)
        return {"id": str(state["id"]), "step": int(state["step"])}
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        before = sorted(path.parent.glob("*run-*-*"))
        return {"id": before[-1].name.rpartition("-")[2]} if before else {}


def _reason(error: Exception) -> str:
    """Give the first line of an error, or its kind."""
    return next((line.strip()[:120] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _quietly(action: Callable[[], object]) -> None:
    with suppress(Exception):
        action()


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
