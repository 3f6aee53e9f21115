"""`moescale report`: what it reads, what it draws, and the page in a browser."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from moescale.cli import app
from moescale.report.content import CLASSES, content_classes, file_kinds, pair_preference, preference, repetition
from moescale.report.history import read_history
from moescale.report.text import hue
from tests.support.browser import CHROMIUM, Browser
from tests.support.reports import TEXT, make_run, make_text


def test_a_run_is_read_and_thinned(tmp_path: Path) -> None:
    run = read_history(make_run(tmp_path / "run", layers=3, experts=4, steps=1000))
    assert run.loads.shape == (200, 3, 4)
    load = [np.array([e + 2 + s % 2 + 1 for e in range(4)]) for s in range(5)]  # layer 2, five steps to a frame
    assert run.loads[7, 2] == pytest.approx(np.mean([each / each.mean() for each in load[1:] + load[1:2]], 0), rel=0.02)
    assert (run.loads[:, 0, 1] == 0).all()
    assert run.frames[-1] == 10_000
    spiky = run.curves["loss"].values.copy()
    spiky[500] = 9
    assert 9 in type(run.curves["loss"])(run.curves["loss"].steps, spiky).thinned().values, "no spike is lost"
    assert run.alerts == [(10_000, "dead experts: layer 0, <1> of 4")]


def test_the_terminal_shows_the_worst(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=2, experts=4, steps=5)
    result = CliRunner().invoke(app, ["report", str(run), "--terminal"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert re.fullmatch(r" +0 ▃x▅▅", next(line for line in lines if line.startswith("   0")))
    assert "Furthest from the mean: L0E1 0.00x" in result.output
    assert "step 50: dead experts: layer 0" in result.output
    for arguments in ([str(tmp_path)], [str(run), "-o", str(tmp_path / "none" / "x.html")]):
        result = CliRunner().invoke(app, ["report", *arguments])
        assert result.exit_code == 2
        assert result.output.startswith("moescale: ")
        assert len(result.output.splitlines()) == 1


def test_many_runs_share_a_page_with_the_keys_that_differ(tmp_path: Path) -> None:
    """Eight runs, two of one name, in between a folder that is gone, one that is empty and a broken configuration."""
    runs: list[Path] = []
    for number in range(8):
        (tmp_path / f"sweep{number // 7}").mkdir(exist_ok=True)
        run = make_run(tmp_path / f"sweep{number // 7}" / f"run{number % 7}", layers=1, experts=4, steps=3)
        config = yaml.safe_load((run / "config.yaml").read_text())
        config |= {"optim": {"lr": 0.001 * (number + 1)}, "run": {**config["run"], "dir": str(run)}}
        config["moe"]["router"] = "gshard" if number == 5 else "mixtral"
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        runs.append(run)
    for name, text in (("empty", None), ("broken", "moe: {num_expert: 4}")):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "config.yaml").write_text(text)
            (tmp_path / name / "metrics.jsonl").write_text('{"step": 1}\n')
    bad = [tmp_path / "gone", tmp_path / "empty", tmp_path / "broken"]
    page = tmp_path / "page.html"
    words = [str(path) for path in (bad[0], *runs[:3], bad[1], bad[2], *runs[3:])]
    result = CliRunner().invoke(app, ["report", *words, "-o", str(page)])
    assert result.exit_code == 0, result.output
    left_out = [line for line in result.output.splitlines() if "left out" in line]
    assert len(left_out) == 3
    assert all(any(str(path) in line for line in left_out) for path in bad)
    table = re.search(r'<table class="runs">(.*?)</table>', page.read_text(), re.DOTALL)
    assert table is not None
    rows = [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
            for row in table[1].split("<tr>")[1:]]
    assert rows[0][:4] == ["run", "moe.router", "optim.lr", "step"], "not run.dir, which names them"
    assert [row[1:3] for row in rows[1:]] == [
        ["gshard" if number == 5 else "mixtral", f"{0.001 * (number + 1)}"] for number in range(8)]
    assert [row[0] for row in rows[2:8]] == [f"run{number}" for number in range(1, 7)]
    assert len({row[0] for row in rows}) == 9, "no two of one name"
    classes = re.findall(r'<g class="(run. dash.)">', page.read_text())
    assert len(set(classes)) == 8, "each has a line of its own kind"
    terminal = CliRunner().invoke(app, ["report", "--terminal", *words])
    assert terminal.exit_code == 0
    assert "optim.lr" in terminal.output
    nothing = CliRunner().invoke(app, ["report", *map(str, bad)])
    assert nothing.exit_code == 2
    assert len(nothing.output.splitlines()) == 1


def test_kinds_of_text_and_repetition_against_loops(tmp_path: Path) -> None:
    routing = make_text(tmp_path, layers=2, experts=4)
    kinds = [CLASSES[kind] for kind in content_classes(routing)[: len(TEXT)]]
    expected = (["keyword"] * 3 + ["white space", "identifier", "punctuation", "identifier", "punctuation",
                "punctuation"] + ["white space"] * 5 + ["keyword"] * 6 + ["white space"] + ["identifier"] * 2
                + ["white space", "punctuation", "white space", "number", "number", "white space", "white space"])
    assert kinds == expected
    assert (content_classes(routing)[2 * len(TEXT) + 2 : 2 * len(TEXT) + 4] == -1).all()
    files, file_of = file_kinds(routing)
    assert files == [".md", ".py"]
    share = preference(routing, file_of, 2, 4)
    for layer, kind, expert in itertools.product(range(2), range(2), range(4)):
        rows = [number for token, experts in enumerate(routing.expert[layer].tolist())
                if routing.kinds[token] == files[kind] for number in experts]
        assert share[layer, kind, expert] == pytest.approx(rows.count(expert) * 4 / len(rows))
    for expert, found in zip(routing.expert, repetition(routing), strict=True):
        first, either, pairs = 0, 0, 0
        for token in range(1, len(expert)):
            if token % routing.seq_len and routing.pieces[token] and routing.pieces[token - 1]:
                pairs += 1
                first += expert[token][0] == expert[token - 1][0]
                either += bool(set(expert[token]) & set(expert[token - 1]))
        assert (found.first, found.either) == pytest.approx((first / pairs, either / pairs))
        assert found.either_by_chance == pytest.approx(5 / 6, abs=0.15)  # two pairs out of four
    count = np.zeros((4, 4))
    for one, two in routing.expert[0][routing.pieces != ""]:
        count[one, two] += 1
        count[two, one] += 1
    load = count.sum(1)
    by_load = np.outer(load, load) * (1 - np.eye(4))
    expected_pairs = count / count.sum() / np.where(by_load, by_load / by_load.sum(), 1)
    found_pairs = pair_preference(routing, 4)[0]
    assert found_pairs[~np.eye(4, dtype=bool)] == pytest.approx(expected_pairs[~np.eye(4, dtype=bool)])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt install chromium, or any of its names on the path")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_answers_in_a_browser(browser: Browser, tmp_path: Path, width: int) -> None:
    runs = [make_run(tmp_path / name, layers=3, experts=8, steps=20) for name in ("one", "two")]
    routing = make_text(runs[0], layers=3, experts=8)
    page = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", *map(str, runs), "-o", str(page)]).exit_code == 0
    browser.open(page, width)
    assert browser.value("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    assert browser.value("document.querySelectorAll('.chart polyline').length") % 2 == 0, "both runs in each chart"
    assert browser.value("document.querySelector('.alerts').textContent") == "step 200: dead experts: layer 0, <1> of 4"

    drawn = "document.querySelector('[data-map=load0] svg').innerHTML"
    at_the_end = browser.value(drawn)
    move = "(s => {{ s.value = {}; s.dispatchEvent(new Event('input')) }})(document.querySelector('input[type=range]'))"
    browser.value(move.format(0))
    assert browser.value("document.querySelector('.slider output').textContent") == "10"
    assert browser.value(drawn) != at_the_end
    browser.value(move.format(19))
    same = "(text => [...text.matchAll(/c(\\d+)\" d=\"([^\"]*)/g)].map(m => m[1] + m[2]).sort().join())"
    assert browser.value(f"{same}({drawn})") == browser.value(f"{same}({json.dumps(at_the_end)})"), "as Python drew it"

    browser.point_at("[data-map=load0] svg", 1.5 / 8, 0.5 / 3)
    reading = browser.value("document.querySelector('[data-map=load0]').closest('figure').querySelector('.reading')"
                            ".textContent")
    assert reading == "layer 0, expert 1: 0.00 times the mean"
    browser.point_at(".chart svg", 0.99)
    assert browser.value("document.querySelector('.chart .reading').textContent") == "step 200: 0.15; 0.15"

    browser.value("(s => { s.value = 1; s.dispatchEvent(new Event('change')) })(document.querySelector('select'))")
    best, second = routing.expert[1, 0].tolist()
    assert browser.value("document.querySelector('.text span').style.getPropertyValue('--hue')") == str(hue(best))
    browser.point_at(".text span")
    weights = [f"{weight:.2f}" for weight in routing.weight[1, 0]]
    assert browser.value("document.querySelector('.text').closest('figure').querySelector('.reading').textContent") == (
        f'"d": expert {best} {weights[0]}, expert {second} {weights[1]}; probabilities ' + ", ".join(
            f"{expert} {np.rint(probability * 1000) / 10:.1f}%" for expert, probability in zip(
                routing.likely[1, 0], routing.probability[1, 0].astype(float), strict=True)))
    map_of_files = "[data-map=files0]"
    browser.point_at(f"{map_of_files} svg", 0.5 / 8, 0.5 / 2)
    kind, share = browser.value(f"document.querySelector('{map_of_files}').closest('figure')"
                                ".querySelector('.reading').textContent").split(", expert 0: ")
    rows = [number for kind_of, experts in zip(routing.kinds, routing.expert[1].tolist(), strict=True)
            if kind_of == ".md" for number in experts if number >= 0]
    assert kind == ".md"
    assert float(share.split()[0]) == pytest.approx(rows.count(0) * 8 / len(rows), rel=0.02, abs=0.01)
    assert share.endswith(" times an even share")
    assert browser.complaints() == []


def test_a_long_run_opens_at_once(browser: Browser, tmp_path: Path) -> None:
    """10,000 logged steps of 32 layers of 64 experts: the same two hundred lines over and over."""
    run = make_run(tmp_path / "run", layers=32, experts=64, steps=200)
    make_text(run, layers=32, experts=64, times=40)
    lines = (run / "metrics.jsonl").read_text().splitlines()[:200]
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(10_000):
            file.write(re.sub(r'"step": \d+', f'"step": {step + 1}', lines[step % 200], count=1) + "\n")
    page = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", str(run), "-o", str(page)]).exit_code == 0
    assert page.stat().st_size < 10e6
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        browser.open(page, 1400)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1
    assert browser.complaints() == []


def test_without_a_script_the_pictures_are_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=3, experts=8, steps=20)
    make_text(run, layers=3, experts=8)
    assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0
    page = (run / "report.html").read_text()
    static = page[: page.index("<script")]
    assert len(re.findall(r'<path class="c\d+" d="M', static)) > 20
    assert static.count("<polyline") >= 2
    assert static.count("--hue:") == 3 * len(TEXT) + 4
    assert "https://" not in page
    assert "<1> of 4" not in page
