"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path


class BackgroundWriter:
    """Writes one checkpoint at a time, in a thread of its own.

    Every rank has one and starts the same writes in the same order. The process group over which a write speaks must be
    nobody else's while it lasts.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._folder: Path | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], Path]) -> None:
        """Begin to write. The write before must have been waited for, so that there are never two at once."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether a write has ended that nobody has waited for."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> Path | None:
        """Wait for the write under way; return its folder, or None where there is none. Raises what it raised."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        error, folder = self._error, self._folder
        self._error = self._folder = None
        if error is not None:
            raise error
        return folder

    def leave(self, seconds: float) -> None:
        """Let a write under way end within a limited time, where the run ends on an error of its own."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, write: Callable[[], Path]) -> None:
        try:
            self._folder = write()
        except BaseException as error:  # for the thread that trains
            self._error = error
