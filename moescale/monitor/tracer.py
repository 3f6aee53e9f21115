"""Some steps in full: each token's experts as a Parquet file, the time of each operation as a profiler's trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moescale.engine.base import Choices, Engine


class Tracer:
    """Looks at the steps asked for, on every rank by itself. trace, profile: steps, counted from 1.

    report: is told where the disk does not take what was seen.
    """

    def __init__(
        self, run_dir: Path, rank: int, *, trace: range, profile: range, report: Callable[[str], None]
    ) -> None:
        self.run_dir, self.rank, self.trace, self.profile, self.report = run_dir, rank, trace, profile, report
        self._profiler: torch.profiler.profile | None = None
        self._first = self._last = 0  # steps of the profile under way

    @contextmanager
    def step(self, step: int, engine: Engine, batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Surround the whole of one step. batches: tokens and token ids of each micro-batch, [batch, seq] int64"""
        seen: list[Choices] = []
        if step in self.profile and self._profiler is None:
            self._profiler, self._first = torch.profiler.profile(), step
            self._profiler.start()
        self._last = step
        if step in self.trace:
            with engine.record(training=True, choices=seen.append):
                yield
            self._write("trace", f"step_{step:08d}", "parquet", lambda path: write_trace(path, step, seen, batches))
        else:
            yield
        if step + 1 not in self.profile:
            self.close()

    def close(self) -> None:
        """Write the profile that is under way, if there is one: a run may end, or fail, before its last step."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
            name = f"steps_{self._first}-{self._last}"
            self._write("profile", name, "json.gz", lambda path: profiler.export_chrome_trace(str(path)))

    def _write(self, folder: str, name: str, ending: str, write: Callable[[Path], object]) -> None:
        path = self.run_dir / folder / f"{name}_rank_{self.rank}.{ending}"
        try:
            path.parent.mkdir(exist_ok=True)
            write(path)
        except OSError as error:
            self.report(f"{path} cannot be written: {error.strerror}; the run goes on without it")


def write_trace(path: Path, step: int, seen: Sequence[Choices], batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write a row for each token, layer and expert that it got.

    Columns: step, layer, serial (the token's `token_id`), token (its id), choice (0 is the first), expert,
    weight.
    What the router dropped has no row; what a row budget leaves out has one.
    """
    import pyarrow
    import pyarrow.parquet

    tokens: dict[int, int] = {}
    for token, token_id in batches:
        tokens.update(zip(token_id.flatten().tolist(), token.flatten().tolist(), strict=True))
    names = ("layer", "serial", "choice", "expert", "weight")
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    for each in seen:
        token, choice = (each.expert >= 0).nonzero(as_tuple=True)
        parts = (torch.full_like(token, each.layer), each.token_id[token], choice, each.expert[token, choice],
                 each.weight[token, choice])
        for name, part in zip(names, parts, strict=True):
            columns[name].append(part.cpu())
    joined: dict[str, Any] = {name: torch.cat(parts).numpy() if parts else [] for name, parts in columns.items()}
    joined["step"] = [step] * len(joined["serial"])
    joined["token"] = [tokens[int(token_id)] for token_id in joined["serial"]]
    pyarrow.parquet.write_table(pyarrow.table(joined), path)
