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
        self._losses: list[float] = []
        self._routing: dict[str, list[int] | int] = {}
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
        self._losses.append(metrics["loss"])
        self._routing = {key: value for key, value in metrics.items() if key.startswith("moe/")}
        if self._progress is not None:
            self._progress.update(self._task, figures=figures)
        else:
            left = (self.steps - step) * metrics["tokens"] / step / metrics["tokens_per_second"]
            self.say(f"step {step}/{self.steps}  {figures}  {int(left) // 60}:{int(left) % 60:02d} left")
        if "eval_loss" in metrics:
            self.say(f"step {step}: held-out loss {metrics['eval_loss']:.4f} nats a token, "
                     f"{metrics['eval_bits_per_byte']:.4f} bits a byte")

    def summarize(self) -> None:
        """Show the loss curve and how the experts were used at the end."""
        if not self._losses:
            return
        self.say(f"loss {self._losses[0]:.3f} {_curve(self._losses)} {self._losses[-1]:.3f}")
        for key, counts in self._routing.items():
            if isinstance(counts, list):
                self.say(f"{key.split('/')[1]} load over mean: {_loads(counts)}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _curve(values: list[float], width: int = 40) -> str:
    """Draw values as blocks of eight heights, at most `width` of them."""
    picked = [values[index * len(values) // width] for index in range(width)] if len(values) > width else values
    low, high = min(picked), max(picked)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / ((high - low) or 1))] for value in picked)


def _loads(counts: list[int]) -> str:
    """Write each expert's load over the mean; of many experts the extremes."""
    loads = sorted((count * len(counts) / max(1, sum(counts)), expert) for expert, count in enumerate(counts))
    if len(loads) <= 16:
        return " ".join(f"{load:.2f}" for load, _ in sorted(loads, key=lambda pair: pair[1]))
    few = [f"expert {expert} {load:.2f}" for load, expert in (*loads[:3], *loads[-3:])]
    return "idlest " + ", ".join(few[:3]) + "; busiest " + ", ".join(few[3:])


def _figures(metrics: Metrics) -> str:
    parts = [f"loss {metrics['loss']:.4f}", f"{metrics['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    routing = {key: value for key, value in metrics.items() if key.startswith("moe/")}
    if routing:
        busiest, idlest = load_range(routing)
        parts.append(f"experts {idlest:.2f} to {busiest:.2f} x mean load")
    return "  ".join(parts)
