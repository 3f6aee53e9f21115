"""How a run is saved: on the disk, at once or while it trains on, and in the memory of hosts."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from moescale.checkpoint.background import BackgroundWriter
from moescale.checkpoint.capture import Capture, HostCopy
from moescale.checkpoint.memory import MemoryCopies, MemoryPlace
from moescale.checkpoint.remote import RemoteStorage
from moescale.checkpoint.store import remove_after
from moescale.checkpoint.together import Failed, Ranks
from moescale.config import CheckpointConfig, ConfigError, NotFiniteError
from moescale.parallel.mesh import Mesh

LONG_SECONDS = 1.0  # a wait for the save before that is worth a word


class Saver:
    """Saves a run on this rank, one moment at a time.

    A moment that cannot be written is no reason to end the run before its last step: the next save tries again.
    """

    def __init__(
        self, write: Callable[[Capture], Path], *, background: bool, key: str,
        saved: Callable[[int, Path], None], report: Callable[[str], None], last: Path | None = None,
    ) -> None:
        """write: writes a moment, all ranks together, and returns where to. background: whether training goes on.

        key: of the configuration, how often it is saved. saved: is told the step and the folder of what was written.
        report: is told, in a sentence, of what went wrong and of long waits. The thread that trains calls both.
        last: the folder that was written last, by a run before.
        """
        self._write, self._background, self._key = write, background, key
        self._saved, self._report = saved, report
        self._host = HostCopy()
        self._writer = BackgroundWriter()
        self._step = 0  # of the write under way
        self.failures = 0  # writes in a row that could not be written
        self.spoilt: NotFiniteError | None = None  # what was to be saved and may not be, since the run last went back
        self.last = last

    def save(self, capture: Callable[[HostCopy | None], Capture], *, last: bool = False) -> None:
        """Save this moment; all ranks call. Returns when the copy is made, or, in the foreground, all is written.

        capture: holds the moment still, in the host memory that it is given. A write that is still under way is waited
        for first. last: no other save follows: all is written when this returns. Raises ConfigError where the last one
        could not be written.
        """
        began = time.monotonic()
        self.finish()
        waited = time.monotonic() - began
        if waited > LONG_SECONDS:
            self._report(f"training waited {waited:.1f} s for the write before: raise {self._key}")
        moment = capture(self._host if self._background else None)
        self._step = moment.step
        self._writer.start(partial(self._write, moment))
        if last or not self._background:
            self.finish(must=last)

    def look(self) -> None:
        """Take note of a write that has ended since the last look."""
        if self._writer.is_over:
            self.finish()

    def finish(self, *, must: bool = False) -> Path | None:
        """Wait for the write under way, if there is one. Returns the folder that was written last, if any.

        must: raise ConfigError where it could not be written, since no other save follows. What may not be written,
        since it holds what is no finite number, is noted in `spoilt`.
        """
        try:
            folder = self._writer.wait()
        except NotFiniteError as error:
            self.spoilt = self.spoilt or error
            return self.last
        except ConfigError as error:
            if must:
                raise
            self.failures += 1
            self._report(f"{error}; training goes on, and the next save tries again")
            return self.last
        if folder is not None:
            self.failures = 0
            self.last = folder
            self._saved(self._step, folder)
        return self.last

    def go_back(self, to: Path) -> None:
        """Wait for the write under way, and forget what may not be saved, before a run takes another course.

        to: the folder that it takes it from, as if that were written last.
        """
        self.finish()
        self.spoilt, self.last = None, to

    def leave(self, seconds: float) -> None:
        """Let a write under way end within a limited time, where the run ends on an error."""
        self._writer.leave(seconds)


class Saving:
    """All that is kept of a run: checkpoints on the disk and, where wanted, copies in the memory of hosts."""

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, mesh: Mesh, place: MemoryPlace | None,
        storage: RemoteStorage | None, *, saved: Callable[[int, Path], None], report: Callable[[str], None],
        last: Path | None,
    ) -> None:
        """place: where copies in memory are kept; None keeps none. storage: where checkpoints are copied to, if
        anywhere. The others are those of `Saver`, for the disk.
        """
        self._every, self._mesh, self._storage, self._report = config.in_memory, mesh, storage, report

        def write(moment: Capture) -> Path:
            folder = moment.write(run_dir, config.keep, mesh.checkpoint_group)
            if storage is not None:
                storage.push(folder, config.keep, mesh.checkpoint_group)
            return folder

        self.disk = Saver(write, background=config.background, key="checkpoint.every", saved=saved, report=report,
                          last=last)
        self._copies = None if place is None else MemoryCopies(place, mesh.memory_group, lambda: self.disk.last)
        self._memory = None if self._copies is None else Saver(
            self._copies.write, background=True, key="checkpoint.in_memory", saved=lambda *_: None, report=report)

    def copies_at(self, step: int) -> bool:
        """Say whether a copy in memory is due after this step."""
        return self._every is not None and step % self._every == 0

    def copy(self, capture: Callable[[HostCopy | None], Capture]) -> None:
        """Keep this moment in the memory of hosts; all ranks call, and go on while it is sent."""
        if self._memory is not None:
            self._memory.save(capture)

    def look(self) -> None:
        """Take note of writes that have ended since the last look."""
        for saver in self._savers:
            saver.look()

    def go_back(self, checkpoint: Path) -> None:
        """Let go of all that is newer than a whole checkpoint, from which a run takes another course; all ranks call.

        Raises ConfigError on every rank where a checkpoint cannot be removed from the disk. Where one cannot be removed
        from the storage that is told, and the run goes on.
        """
        self.disk.go_back(checkpoint)
        if self._copies is not None and self._memory is not None:
            self._memory.finish()
            self._copies.clear()
        try:
            Ranks(self._mesh.checkpoint_group).on_first(lambda: remove_after(checkpoint))
        except Failed as error:
            raise ConfigError(f"what is newer than {checkpoint}, to which the run goes back, cannot be removed: "
                              f"{error}; remove it and start again") from None
        if self._storage is not None:
            try:
                self._storage.remove_after(checkpoint, self._mesh.checkpoint_group)
            except ConfigError as error:
                self._report(str(error))

    def end(self, capture: Callable[[HostCopy | None], Capture]) -> Path | None:
        """Save the last moment of a run and let go of copies in memory; all ranks call.

        Returns the checkpoint. Raises ConfigError where it could not be written: then the copies stay. What may not be
        written is in `disk.spoilt`: then the run does not end here.
        """
        self.disk.save(capture, last=True)
        if self.disk.spoilt is None and self._copies is not None and self._memory is not None:
            self._memory.finish()
            self._copies.remove()
        return self.disk.last

    def leave(self, seconds: float) -> None:
        """Let writes under way end within a limited time, where the run ends on an error."""
        for saver in self._savers:
            saver.leave(seconds)

    @property
    def _savers(self) -> list[Saver]:
        return [self.disk] if self._memory is None else [self.disk, self._memory]
