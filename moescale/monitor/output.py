"""All that a run shows and writes while it goes on, but for checkpoints; what fails of it ends no run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moescale.config import Config, ConfigError
from moescale.files.writing import replace_text
from moescale.monitor.alerts import Alerts
from moescale.monitor.terminal import Terminal
from moescale.monitor.wandb import Wandb
from moescale.record.metrics import JsonLines


class Output:
    """Rank 0 writes figures and says what happens; the other ranks, which hold one too, are silent.

    step: the number of steps done. resumed_from: the checkpoint that the run goes on from. tokens_left: tokens that
    are to come after so many steps. Raises ConfigError where the run directory cannot be written at the start.
    """

    def __init__(
        self, config: Config, run_dir: Path, rank: int, step: int, resumed_from: Path | None,
        tokens_left: Callable[[int], int],
    ) -> None:
        self.config, self.run_dir = config, run_dir
        self._news: list[str] = []
        self._highest = -math.inf  # loss since the last line
        self._alerts = self._new_alerts()
        self._terminal = self._lines = self._wandb = None
        if rank != 0:
            return
        self._terminal = Terminal(step, config.run.steps, tokens_left)
        try:
            replace_text(run_dir / "config.yaml", config.to_yaml())
            self._lines = JsonLines(run_dir, step + 1, self.tell)
        except OSError as error:
            self._terminal.close()
            raise ConfigError(f"run.dir={run_dir} cannot be written: {error.strerror}") from None
        self._wandb = self._open_wandb(resumed_from)

    def say(self, text: str) -> None:
        """Print one line."""
        if self._terminal is not None:
            self._terminal.say(text)

    def tell(self, *notes: str) -> None:
        """Say what happened, at once in the terminal, and with the next figures as alerts."""
        self._news += notes
        for note in notes:
            self.say(note)

    def advance(self, step: int) -> None:
        """One more step is done. step: how many in all"""
        if self._terminal is not None:
            self._terminal.advance(step)

    def see(self, losses: Iterable[float]) -> None:
        """Take the losses of steps that are done, of which the next figures have the highest."""
        self._highest = max([self._highest, *filter(math.isfinite, losses)])

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the figures of one step; those that are no finite numbers, of an update left out, are left out too."""
        metrics = {"loss_max": self._highest, **metrics}
        metrics = {key: value for key, value in metrics.items() if not isinstance(value, float) or math.isfinite(value)}
        self._highest = -math.inf
        alerts = [] if self._terminal is None else self._alerts.check(metrics)
        for sink in self._sinks:
            told = alerts if sink is self._terminal else [*self._news, *alerts]  # news was said when it came
            sink.write(step, {**metrics, "alerts": told} if told else metrics)
        self._news = []

    def saved(self, step: int, checkpoint: Path) -> None:
        """A checkpoint is on disk."""
        for sink in self._sinks:
            sink.saved(step, checkpoint)

    def go_back(self, step: int, checkpoint: Path) -> None:
        """Begin anew after this step, from which the run takes another course."""
        self._alerts, self._highest = self._new_alerts(), -math.inf
        if self._lines is not None:
            self._lines.go_back(step + 1)
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = self._open_wandb(checkpoint)

    def summarize(self) -> None:
        """Show how the run went."""
        if self._terminal is not None:
            self._terminal.summarize()

    def close(self) -> None:
        """Nothing follows."""
        for sink in self._sinks:
            sink.close()

    @property
    def _sinks(self) -> list[Terminal | JsonLines | Wandb]:
        return [sink for sink in (self._terminal, self._lines, self._wandb) if sink is not None]

    def _new_alerts(self) -> Alerts:
        monitor = self.config.monitor
        return Alerts(top_k=self.config.moe.top_k, every=monitor.every, dropped_limit=monitor.alert_dropped)

    def _open_wandb(self, resumed_from: Path | None) -> Wandb | None:
        monitor = self.config.monitor
        if monitor.wandb == "off":
            return None
        return Wandb(self.run_dir, monitor.wandb_project, monitor.wandb, self.config.model_dump(mode="json"),
                     resumed_from=resumed_from, artifacts=monitor.wandb_artifacts, say=self.say)
