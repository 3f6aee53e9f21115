"""What a person sees while a run goes on: a progress bar, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from moescale.errors import visible
from moescale.record.figures import ExpertLoad, Line, expert_loads
from moescale.report.characters import curve


class _View:
    """Standard output as a view of the run: what it cannot show is left out, all of it where it is closed or full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._broken = False

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        self._try(lambda: self._stream.write(text.encode(encoding, "replace").decode(encoding)))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], object]) -> None:
        if not self._broken:
            try:
                work()
            except (OSError, ValueError):
                self._broken = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Terminal:
    """A sink for standard output."""

    def __init__(self, first_step: int, steps: int, tokens_left: Callable[[int], int]) -> None:
        """tokens_left: tokens that are to come after so many steps."""
        self.console = Console(highlight=False, soft_wrap=True, file=cast(TextIO, _View(sys.stdout)))
        self.steps, self.tokens_left = steps, tokens_left
        self._losses: list[float] = []
        self._experts: list[ExpertLoad] = []
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = Progress(
                MofNCompleteColumn(table_column=Column(min_width=2 * len(str(steps)) + 1)),
                TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True, table_column=Column(min_width=5)),
                BarColumn(bar_width=None), console=self.console,
            )
            self._task = self._progress.add_task("", total=steps, completed=first_step, figures="")
            self._progress.start()

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(visible(text, keep="\n\t"), markup=False)

    def advance(self, step: int) -> None:
        """One more step is done. step: how many in all"""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, step: int, metrics: Line) -> None:
        figures = _figures(metrics)
        self._losses += [metrics["loss"]] if "loss" in metrics else []
        self._experts = expert_loads(metrics)
        if self._progress is not None:
            self._progress.update(self._task, figures=figures)
        else:
            left = self.tokens_left(step) / metrics["tokens_per_second"]
            self.say(f"step {step}/{self.steps}  {figures}  {int(left) // 60}:{int(left) % 60:02d} left")
        for text in metrics.get("alerts", []):
            self.say(f"step {step}: {text}")
        if "eval_loss" in metrics:
            self.say(f"step {step}: held-out loss {metrics['eval_loss']:.4f} nats a token, "
                     f"{metrics['eval_bits_per_byte']:.4f} bits a byte")

    def saved(self, step: int, checkpoint: Path) -> None:
        pass

    def summarize(self) -> None:
        """Show the loss curve and how the experts were used at the end."""
        if not self._losses:
            return
        self.say(f"loss {self._losses[0]:.3f} {curve(self._losses)} {self._losses[-1]:.3f}")
        for layer in sorted({expert.layer for expert in self._experts}):
            experts = [expert for expert in self._experts if expert.layer == layer]  # the idlest first
            if len(experts) > 16:
                text = ", ".join(_named(expert) for expert in (*experts[:3], *experts[-3:]))
            else:
                text = " ".join(f"{expert.load:.2f}" for expert in sorted(experts, key=lambda e: e.expert))
            self.say(f"layer {layer}, load of each expert over the mean: {text}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _named(expert: ExpertLoad) -> str:
    return f"L{expert.layer}E{expert.expert} {expert.load:.2f}x"  # layer, expert, load over the layer's mean


def _figures(metrics: Line) -> str:
    parts = [f"loss {metrics['loss']:.4f}" if "loss" in metrics else "no loss",  # of an update that was left out
             f"{metrics['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    experts = expert_loads(metrics)
    if experts:
        parts.append(f"busiest {_named(experts[-1])}, idlest {_named(experts[0])}")
    return "  ".join(parts)
