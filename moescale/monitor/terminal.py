"""What a person sees while a run goes on: a progress bar, or plain lines where there is no terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moescale.monitor.metrics import Metrics
from moescale.monitor.routing import load_range


class Terminal:
    """A sink for standard output."""

    def __init__(self, first_step: int, steps: int) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.steps = steps
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=self.console,
            )
            self._task = self._progress.add_task("", total=steps, completed=first_step, figures="")
            self._progress.start()

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """One more step is done. step: how many in all"""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, step: int, metrics: Metrics) -> None:
        figures = _figures(metrics)
        if self._progress is not None:
            self._progress.update(self._task, figures=figures)
        else:
            left = (self.steps - step) * metrics["tokens"] / step / metrics["tokens_per_second"]
            self.say(f"step {step}/{self.steps}  {figures}  {int(left) // 60}:{int(left) % 60:02d} left")
        if "eval_loss" in metrics:
            self.say(f"step {step}: held-out loss {metrics['eval_loss']:.4f} nats a token, "
                     f"{metrics['eval_bits_per_byte']:.4f} bits a byte")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _figures(metrics: Metrics) -> str:
    parts = [f"loss {metrics['loss']:.4f}", f"{metrics['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    routing = {key: value for key, value in metrics.items() if key.startswith("moe/")}
    if routing:
        busiest, idlest = load_range(routing)
        parts.append(f"experts {idlest:.2f} to {busiest:.2f} x mean load")
    return "  ".join(parts)
