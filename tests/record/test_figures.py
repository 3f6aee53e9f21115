"""Keys are made and read back in one place, and whoever shows figures asks for some that exist."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from moescale.monitor.wandb_workspaces import PICTURES, SECTIONS
from moescale.record import figures
from moescale.record.figures import OF_ALL, OF_LAYER, OF_RUN, by_layer, figure, of_all, of_layer, parse
from moescale.record.metrics import FILE, JsonLines, read_lines
from moescale.report.characters import TREND
from moescale.report.page import CURVES, TILES
from moescale.report.side_by_side import FIGURES


def test_a_key_is_read_back_as_it_was_made() -> None:
    for layer in (0, 7, 123):
        for name in OF_LAYER:
            assert parse(of_layer(name, layer)) == (name, layer)
            assert figure(of_layer(name, layer)) is OF_LAYER[name]
    for name in OF_ALL:
        assert parse(of_all(name)) == (name, None)
        assert figure(of_all(name)) is OF_ALL[name]
    with pytest.raises(AssertionError):
        of_layer("max_laod", 0)
    with pytest.raises(KeyError):
        figure("moe/loss")


def test_keys_of_runs_made_before_are_the_same() -> None:
    line = {"step": 3, "loss": 2.5, "moe/max_load": 1.5, "moe/layer_01/tokens_per_expert": [3, 1],
            "moe/layer_120/tokens_per_expert": [2, 2], "moe/layer_01/dropped_share": 0.25,
            "moe/rows_between_ranks": [[4]]}
    assert by_layer(line, "tokens_per_expert") == {1: [3, 1], 120: [2, 2]}
    assert by_layer(line, "dropped_share") == {1: 0.25}
    assert figures.rows_between_ranks(line).tolist() == [[4]]
    loads = figures.counts_of_all(line, [1, 120], 2)
    assert loads is not None
    assert np.array_equal(loads, [[3, 1], [2, 2]])
    assert figures.counts_of(line, 2, 2) is None
    assert figures.counts_of(line, 1, 3) is None


def test_whoever_shows_figures_asks_for_some_that_exist() -> None:
    panels = [keys for section in SECTIONS.values() for keys in section.values()]
    shown = [key for keys in panels if isinstance(keys, list) for key in keys]
    for key in (*CURVES, *TILES, *TREND, *FIGURES, *PICTURES.values(), *shown):
        assert figure(key).shape in ((), ("picture",))
    assert set(OF_RUN) >= {"step", "loss", "alerts"}


def test_lines_of_a_run_that_was_cut_off_go_and_others_stay_as_they_are(tmp_path: Path) -> None:
    kept = b'{"step": 1, "loss": 3}\n{"loss": 2.5,"step":2}\n'
    (tmp_path / FILE).write_bytes(kept + b'{"step": 3}\nno json\n{"step": 4, "lo')
    lines = JsonLines(tmp_path, 3, print)
    assert (tmp_path / FILE).read_bytes() == kept
    lines.write(3, {"loss": 2})
    with (tmp_path / FILE).open("rb") as file:
        assert [line["step"] for line in read_lines(file)] == [1, 2, 3]
    assert json.loads((tmp_path / FILE).read_bytes().splitlines()[-1]) == {"step": 3, "loss": 2}


def test_lines_that_a_full_disk_does_not_take_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    lines, file = JsonLines(tmp_path, 1, said.append), tmp_path / FILE

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in file.read_bytes().splitlines()]

    lines.write(1, {"loss": 2.0})
    size, before = file.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))  # so that a line is cut in the middle
    try:
        for step in (2, 3):
            lines.write(step, {"loss": 2.0})
            assert file.stat().st_size == size, "no half line stays"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(said) == 1
    assert "cannot be written: No space left on device; its lines wait" in said[0]
    lines.write(4, {"loss": 2.0})
    assert steps() == [1, 2, 3, 4]
    assert "written again" in said[1]

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as read_only:
        read_only.setattr("moescale.record.metrics.replace_bytes", refuse)
        lines.go_back(3)
        lines.write(3, {"loss": 1.0})
        assert steps() == [1, 2, 3, 4]
    assert "Read-only file system" in said[2]
    lines.close()
    assert steps() == [1, 2, 3]
    assert json.loads(file.read_bytes().splitlines()[-1])["loss"] == 1.0
