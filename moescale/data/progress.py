"""Show how far the reading of a corpus has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

FIRST_SECONDS, LINE_SECONDS, BAR_SECONDS = 3.0, 30.0, 0.2  # nothing is shown of what takes no longer than the first


class Reading:
    """How much of some files has been read. what: is done with them. total_bytes: of all of them."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self.what, self.total_bytes = what, total_bytes
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.started = time.monotonic()
        self._next = self.started + FIRST_SECONDS
        self._bar: Progress | None = None

    def advance(self, before_bytes: int, path: str, read_bytes: int) -> None:
        """Show what has been read: all of before_bytes, and read_bytes of the file `path`."""
        done_bytes = before_bytes + read_bytes
        now = time.monotonic()
        if now < self._next:
            return
        with contextlib.suppress(OSError, ValueError):  # a view of the work must not end it
            if self.console.is_terminal:
                self._next = now + BAR_SECONDS
                self._show_bar(done_bytes, path)
            else:
                self._next = now + LINE_SECONDS
                speed = done_bytes / (now - self.started)
                left = int((self.total_bytes - done_bytes) / max(speed, 1))
                self.console.print(
                    f"{self.what}: {done_bytes / 1e6:,.1f} of {self.total_bytes / 1e6:,.1f} MB, "
                    f"{speed / 1e6:,.1f} MB/s, {left // 60}:{left % 60:02d} left, at {path}", markup=False)

    def _show_bar(self, done_bytes: int, path: str) -> None:
        if self._bar is None:
            self._bar = Progress(TextColumn(self.what), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                                 TimeRemainingColumn(), TextColumn("{task.fields[path]}", markup=False),
                                 console=self.console, auto_refresh=False, transient=True)
            self._task = self._bar.add_task("", total=self.total_bytes, path="")
            self._bar.start()
        self._bar.update(self._task, completed=done_bytes, path=path[-60:], refresh=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.stop()


@contextlib.contextmanager
def reading(what: str, total_bytes: int) -> Iterator[Reading]:
    """Show progress while the block runs."""
    shown = Reading(what, total_bytes)
    try:
        yield shown
    finally:
        shown.close()
