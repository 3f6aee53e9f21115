"""Messages of docs/operations.md, provoked: what an operator sees is what stands in the table of its section."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from moescale.checkpoint import memory, store
from moescale.cli import app
from moescale.cluster import directory, surroundings
from moescale.cluster.agreement import Agreement
from moescale.cluster.identity import refuse_differences
from moescale.cluster.launch import Launch, read_launch
from moescale.comm.collectives import local_tensor
from moescale.config import ConfigError, Silenced
from moescale.engine.native import NativeEngine
from moescale.files.locks import FileLock
from moescale.parallel.ranks import run_ranks
from tests.support.agents import Node
from tests.support.command_line import ROOT, TINY
from tests.support.flips import flipped_once
from tests.support.hangs import hang
from tests.support.ports import free_port
from tests.support.saved import flip

PLACEHOLDER = re.compile(r" ?\.\.\.|(?<![A-Za-z0-9])[A-Z]+(?:_[A-Z]+)*(?![A-Za-z0-9_])")
STEPS = 8


def is_literal(word: str) -> bool:
    """Whether a word in capitals is the name of a signal or of a variable, and stands for itself."""
    return word in signal.Signals.__members__ or "_" in word


def pattern_of(message: str) -> re.Pattern[str]:
    """Turn a message of the document into what its lines look like: capitals and dots stand for anything."""
    parts, end = [], 0
    for found in PLACEHOLDER.finditer(message):
        if not is_literal(found[0]):
            parts += [re.escape(message[end:found.start()]), ".*" if found[0].endswith("...") else r"\S.*?"]
            end = found.end()
    return re.compile("".join([*parts, re.escape(message[end:])]))


def documented(section: str) -> list[str]:
    """Read the messages of a section's table; some rows have two, in backquotes."""
    text = (ROOT / "docs/operations.md").read_text()
    (part,) = re.findall(rf"^##+ {re.escape(section)}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    cells = [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("|")]
    messages = [message for cell in cells for message in ([
        quoted for quoted in re.findall("`([^`]+)`", cell) if " " in quoted] or [cell])]
    return [message for message in messages if message.lower() != "message" and not set(message) <= set("-")]


def check(section: str, *lines: str) -> set[str]:
    """Hold each line to the one message of this section that it is; return those messages."""
    known, met = documented(section), set()
    assert lines, "nothing was said"
    for line in lines:
        said = line.removeprefix("moescale: ")
        found = [message for message in known if pattern_of(message).match(said)]
        assert len(found) == 1, f"{said!r} is {found or 'none'} of {known}"
        met.update(found)
    return met


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and a configuration of few steps."""
    folder = tmp_path_factory.mktemp("messages")
    (folder / "text").mkdir()
    for number in range(8):
        (folder / f"text/{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    data = {**TINY["data"], "files": [f"{folder}/text/*.txt"], "cache_dir": str(folder / "cache")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({
        **TINY, "run": {"steps": STEPS}, "data": data, "monitor": {**TINY["monitor"], "moved_every": None},
        "checkpoint": {"every": 2, "keep": 9, "background": False}}))
    return folder


def train(folder: Path, name: str, *words: str, status: int = 0) -> list[str]:
    """Train in this process. Returns its alerts, or where it does not end well what it says last."""
    result = CliRunner().invoke(app, ["train", str(folder / "tiny.yaml"), f"run.dir={folder / name}", *words])
    assert result.exit_code == status, result.output
    if status:
        return [result.output.splitlines()[-1]]
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [alert for line in lines for alert in json.loads(line).get("alerts", [])]


def at_call(number: int, real: Callable[..., Any], act: Callable[..., Any]) -> Callable[..., Any]:
    """Act instead of one call of a function, with its arguments."""
    calls = iter(range(1, 10**6))
    return lambda *args, **kwargs: (act if next(calls) == number else real)(*args, **kwargs)


def refuse_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_ranks_that_do_not_come() -> None:
    with pytest.raises(ConfigError) as error:
        Agreement(Launch(rank=0, size=2, address="127.0.0.1", port=free_port())).meet(0.2)
    check("The ranks do not meet", str(error.value))


def differ() -> str:
    ranks = Agreement(read_launch())
    with suppress(Silenced), ranks.one_voice():
        ranks.meet(20)
        try:
            refuse_differences(ranks, {"optim.lr": str(ranks.launch.rank)}, "start every rank with the same")
        except ConfigError as error:
            return str(error)
    return ""


def test_ranks_that_differ() -> None:
    check("The ranks do not agree", run_ranks(2, differ, timeout_seconds=40)[0])


def test_a_run_directory_in_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "CLAIM_SECONDS", 0.1)
    (folder / "used").mkdir()
    other = FileLock(folder / "used")
    check("The ranks do not agree", *train(folder, "used", status=2))
    other.close()


def test_a_memory_file_system_that_is_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**10))
    words = ["checkpoint.in_memory=1", f"checkpoint.memory_dir={folder}"]
    output = CliRunner().invoke(app, ["train", str(folder / "tiny.yaml"), f"run.dir={folder}/small", *words]).output
    said = [line for line in output.splitlines() if "are free" in line]
    assert len(check("The ranks do not agree", *said)) == 2, "the disk's, and the memory's"


def test_ranks_that_are_killed_and_started_again(tmp_path: Path) -> None:
    node = Node(tmp_path, "SIGKILL", restarts=1)
    assert node.end() == 1
    assert len(check("A rank ended", *node.said)) == 3
    assert len(node.said) == 4, "a rank is killed twice"


def test_a_run_that_is_asked_to_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = NativeEngine.step

    def step(*args: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return real(*args)

    monkeypatch.setattr(NativeEngine, "step", at_call(3, real, step))
    check("A rank ended", *train(folder, "asked", status=75))


@pytest.mark.parametrize(("answer", "words"), [("skip", ()), ("back", ("spikes.back=2",))])
def test_a_step_that_is_not_finite(
    folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str, words: tuple[str, ...]
) -> None:
    real = NativeEngine.forward_backward

    def spoil(engine: NativeEngine, *args: Any, **options: Any) -> Any:
        losses = real(engine, *args, **options)
        local_tensor(next(iter(engine.parameters().values())).grad).view(-1)[0] = torch.nan
        return losses

    monkeypatch.setattr(NativeEngine, "forward_backward", at_call(5, real, spoil))
    alerts = train(folder, answer, f"spikes.not_finite={answer}", *words)
    assert len(check("Losses and gradients", *alerts)) == 1


def hang_aloud(folder: Path) -> None:
    os.dup2(os.open(folder / "said", os.O_CREAT | os.O_WRONLY), 2)
    hang(str(folder), "wait_for_ever", False)


def test_a_step_that_hangs(tmp_path: Path) -> None:
    rank = multiprocessing.get_context("fork").Process(target=hang_aloud, args=(tmp_path,))
    rank.start()
    rank.join(30)
    assert rank.exitcode == -signal.SIGKILL
    assert len(check("Steps that hang", *(tmp_path / "said").read_text().splitlines())) == 2


def test_a_full_disk_and_a_damaged_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_finish", at_call(2, store._finish, refuse_space))
    check("The disk", *train(folder, "full"))
    for step in (STEPS, STEPS - 2):
        flip(folder / f"full/checkpoints/step_{step:08d}/__0_0.distcp")
    alerts = train(folder, "full", f"run.steps={STEPS + 2}")
    assert len(alerts) == 2
    check("Checkpoints that are damaged", *alerts)


def test_a_bit_that_flips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = NativeEngine.forward_backward

    def turn(engine: NativeEngine, *args: Any, **options: Any) -> Any:
        with flipped_once(engine.model.blocks["1"], "activation"):
            return real(engine, *args, **options)

    monkeypatch.setattr(NativeEngine, "forward_backward", at_call(4, real, turn))
    check("Silent corruption", *train(folder, "flipped", "run.audit_every=4"))


def test_copies_that_cannot_be_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section, words = "Saving and starting again", ("checkpoint.in_memory=3", "checkpoint.every=100")
    first = check(section, *train(folder, "nowhere", *words, f"checkpoint.memory_dir={folder}/none", status=2))
    (folder / "memory").mkdir()
    monkeypatch.setattr(memory, "write_tensors", at_call(1, memory.write_tensors, refuse_space))
    alerts = train(folder, "copied", *words, f"checkpoint.memory_dir={folder}/memory")
    assert len(first | check(section, *alerts)) == 2
