"""`moescale report` on what damage, other tools or enemies left in a run: drawn without it, or one line."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moescale.cli import app
from moescale.record import held_out
from moescale.record.held_out import FILE, HeldOutRouting
from tests.support.reports import make_run, make_text

TURNED = "\N{RIGHT-TO-LEFT OVERRIDE}"
FIGURES = ("loss", "tokens_per_second", "moe/max_load", "moe/min_load", "moe/dropped_share", "moe/bytes_sent",
           "moe/rows_between_ranks", "moe/layer_00/tokens_per_expert", "moe/layer_01/tokens_per_expert", "alerts")
ODD = (  # texts of JSON; none leaves the key out
    None, "NaN", "-Infinity", "1e999", "1e308", "1" + "0" * 400, '"text"', "true", "null", "[]", "{}", "[[]]", "[1]",
    "[[1, 2], [3]]", '["a"]', "[[1, null], [1, 1]]", "[-1, -1, -1, -1]", "[NaN, 1, 1, 1]",
    "[1e308, 1e308, 1e308, 1e308]", "[true, 1, 1, 1]", "[" * 50 + "]" * 50, "1e-320",
)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]


def shown(run: Path) -> tuple[str, str]:
    """Draw a run as a page and in characters, or see one line. Returns both texts."""
    page = CliRunner().invoke(app, ["report", str(run)])
    terminal = CliRunner().invoke(app, ["report", str(run), "--terminal"])
    assert page.exit_code == terminal.exit_code, page.output
    for result in (page, terminal):
        if result.exit_code != 0:
            assert result.exit_code == 2, result.exception
            assert result.output.startswith("moescale: ")
            assert len(result.output.splitlines()) == 1
    return (run / "report.html").read_text() if page.exit_code == 0 else "", terminal.output


@pytest.mark.parametrize("key", FIGURES)
def test_a_figure_that_is_none_is_left_out(tmp_path: Path, key: str) -> None:
    run = make_run(tmp_path / "run", layers=2, experts=4, steps=5)
    lines = lines_of(run)
    for odd in ODD:
        texts = []
        for number, line in enumerate(lines):
            values = {name: json.dumps(value) for name, value in line.items()}
            if number >= 2:
                values.pop(key, None)
                values |= {} if odd is None else {key: odd}
            texts.append("{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in values.items()) + "}")
        (run / "metrics.jsonl").write_text("\n".join(texts) + "\n")
        page, _ = shown(run)
        assert "<h1" in page, odd
        assert "nan" not in page[page.index("<body") : page.index("<script")].lower(), odd


@pytest.mark.parametrize("step", [
    "-1", "1.5", "true", '"5"', "1e3", "NaN", "1" * 400, "[5]", "9007199254740993", "null",
])
def test_a_step_that_is_none_takes_its_line_along(tmp_path: Path, step: str) -> None:
    run = make_run(tmp_path / "run", layers=2, experts=4, steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": ' + step + ', "loss": 1.0}\n')
    assert "step 50" in shown(run)[1]


@pytest.mark.parametrize("bad", [
    b"\xff\xfe\x00", b'{"step": 60, "loss": "\xff"}', b"[]", b"7", b"", b"\x00" * 1000, b"[" * 100_000, b'{"step": 60',
    b'{"step": 60, "alerts": [' + b"[" * 5000,
], ids=range(9))
def test_a_line_that_is_none_is_passed_over(tmp_path: Path, bad: bytes) -> None:
    run = make_run(tmp_path / "run", layers=2, experts=4, steps=5)
    whole = b"\n".join(line for line in (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1])
    (run / "metrics.jsonl").write_bytes(bad + b"\n" + whole + b"\n" + bad)
    assert "step 50" in shown(run)[1]
    (run / "metrics.jsonl").write_bytes(bad)
    assert "no complete line yet" in shown(run)[1]


def test_text_that_turns_round_turns_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / f"run{TURNED}<b>", layers=2, experts=4, steps=5)
    line = lines_of(run)[-1] | {"step": 60, "alerts": [f"one{TURNED}\x1b[31m<i>\N{POP DIRECTIONAL ISOLATE}"]}
    whole = (run / "metrics.jsonl").read_text().rpartition("\n")[0]
    (run / "metrics.jsonl").write_text(whole + "\n" + json.dumps(line))
    routing = make_text(run, layers=2, experts=4)
    pieces, kinds = routing.pieces.astype("U9"), routing.kinds.astype("U9")
    pieces[3], kinds[kinds == ".md"] = f"{TURNED}<u>\x00", f".{TURNED}<s>"
    replace(routing, pieces=pieces, kinds=kinds).save(run)
    page, terminal = shown(run)
    for text in (page, terminal):
        assert TURNED not in text
        assert "\x1b[31m" not in text
    for tag in ("<b>", "<i>", "<u>", "<s>"):
        assert tag not in page.replace("<b>1</b>", ""), "a name is no markup"
    assert "\\u202e" in terminal
    assert "unicode-bidi: isolate" in page, "letters of languages that are written from the right stay where they are"


def with_arrays(**change: Any) -> Callable[[Path, HeldOutRouting], None]:
    def write(path: Path, routing: HeldOutRouting) -> None:
        np.savez(path, **{**asdict(routing), **change})
    return write


def _bytes(content: bytes) -> Callable[[Path, HeldOutRouting], None]:
    return lambda path, routing: path.write_bytes(content) and None


def _bomb(path: Path, routing: HeldOutRouting) -> None:
    np.savez_compressed(path, **{**asdict(routing), "weight": np.zeros((2, 1 << 20), np.float32)})


def _claims(path: Path, routing: HeldOutRouting) -> None:
    """An array that says it is huge, of which nothing is there."""
    np.savez(path, **asdict(routing))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    entries["weight.npy"] = head.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


NONE = np.zeros(0)
ODD_ROUTINGS: dict[str, Callable[[Path, HeldOutRouting], None]] = {
    "no archive": _bytes(b"text"), "empty": _bytes(b""), "a bomb": _bomb, "a huge claim": _claims,
    "a pickle": with_arrays(pieces=np.array([{}], dtype=object)), "one more": with_arrays(more=NONE),
    "no step": with_arrays(step=np.array("x")), "a step of 1e30": with_arrays(step=np.array(1e30)),
    "a step below 0": with_arrays(step=np.array(-5)), "sequences of none": with_arrays(seq_len=np.array(0)),
    "no layers": with_arrays(layers=NONE), "layers elsewhere": with_arrays(layers=np.array([5, 6])),
    "flat experts": with_arrays(expert=np.zeros(4, int)), "few tokens": with_arrays(expert=np.zeros((2, 3, 2), int)),
    "no weights": with_arrays(weight=NONE), "few texts": with_arrays(pieces=np.array(["a"])),
    "texts of numbers": with_arrays(pieces=np.zeros(66)), "few kinds": with_arrays(kinds=np.array(["a", "b"])),
    "no likely": with_arrays(likely=NONE), "no probability": with_arrays(probability=np.zeros((2, 66))),
}


@pytest.mark.parametrize("write", ODD_ROUTINGS.values(), ids=ODD_ROUTINGS)
def test_a_held_out_routing_that_is_none_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, HeldOutRouting], None]
) -> None:
    monkeypatch.setattr(held_out, "LARGEST", 1 << 20)
    run = make_run(tmp_path / "run", layers=2, experts=4, steps=3)
    write(run / FILE, make_text(run, layers=2, experts=4))
    assert HeldOutRouting.load(run) is None or "layers elsewhere" in os.environ["PYTEST_CURRENT_TEST"]
    page, _ = shown(run)
    assert "Over time" in page
    assert "Where text goes" not in page


@pytest.mark.parametrize("value", [4, 300, -2])
def test_an_expert_that_there_is_not_is_not_drawn(tmp_path: Path, value: int) -> None:
    run = make_run(tmp_path / "run", layers=2, experts=4, steps=3)
    routing = make_text(run, layers=2, experts=4)
    routing.expert[0, 2, 0] = value
    routing.save(run)
    assert "Where text goes" not in shown(run)[0]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", FILE])
def test_a_pipe_or_a_folder_is_not_waited_for(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", layers=2, experts=4, steps=3)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    page, _ = shown(run)
    assert ("Over time" in page) == (name == FILE)
    (run / name).unlink()
    (run / name).mkdir()
    assert shown(run)[1]
