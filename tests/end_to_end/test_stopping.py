"""A run that is asked to end, or whose ranks die, loses nothing but the step under way."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from moescale import start as begin
from moescale import trainer
from moescale.checkpoint import store
from moescale.checkpoint.tensor_files import Writer
from moescale.cli import app
from moescale.engine.native import NativeEngine
from moescale.evaluate import Evaluation
from tests.support.command_line import TINY
from tests.support.launched import end, launch, losses, ranks_of, wait_for_steps

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, its tokens, and a configuration; the run in `whole` was never disturbed."""
    folder = tmp_path_factory.mktemp("stopping")
    (folder / "text").mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    data = {**TINY["data"], "files": [f"{folder}/text/*.txt"], "cache_dir": str(folder / "cache"), "micro_batch": 1}
    monitor = {**TINY["monitor"], "moved_every": None}
    config = {**TINY, "run": {"steps": STEPS}, "data": data, "monitor": monitor,
              "checkpoint": {"every": 1000, "keep": 3}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert start(folder, "whole")[0] == 0
    return folder


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """See that a run gives back the signals that it listened to."""
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, which a run respects
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)]
    yield
    assert before == [signal.getsignal(number) for number in (
        signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)]
    signal.signal(signal.SIGHUP, outside)


def start(folder: Path, run: str, *words: str) -> tuple[int, str]:
    """Train in this process. -> exit status, output"""
    result = CliRunner().invoke(app, ["train", str(folder / "tiny.yaml"), f"run.dir={folder / run}", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoints/*"))


def once(times: int, work: Callable[[], object], real: Callable) -> Callable:
    """Do something just before the call of that number."""
    calls = iter(range(1, 10**6))

    def call(*args: object, **kwargs: object) -> object:
        if next(calls) == times:
            work()
        return real(*args, **kwargs)

    return call


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130),
], ids=lambda value: getattr(value, "name", value))
def test_a_signal_lets_the_step_be_finished_and_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    run = f"run_{number.name}"
    monkeypatch.setattr(NativeEngine, "step", once(4, send(number), NativeEngine.step))
    ended, output = start(folder, run)
    monkeypatch.undo()
    assert ended == status
    assert saved(folder / run) == ["step_00000004"]
    assert number.name in output
    assert "step_00000004" in output.splitlines()[-1]
    assert start(folder, run)[0] == 0
    assert losses(folder / run) == losses(folder / "whole")


def test_limits_of_time_save_and_stop(folder: Path) -> None:
    status, output = start(folder, "limited", "run.time_limit_minutes=1e-3", "run.steps=100000")
    assert status == 75
    assert "run.time_limit_minutes" in output
    assert saved(folder / "limited")
    assert start(folder, "often", "checkpoint.every_minutes=1e-6")[0] == 0
    assert saved(folder / "often") == [f"step_{step:08d}" for step in range(STEPS - 2, STEPS + 1)]


def test_a_signal_during_an_evaluation_or_a_save_lets_it_be_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluation, "run", once(1, send(signal.SIGTERM), Evaluation.run))
    assert start(folder, "evaluating", "monitor.eval_every=5")[0] == 75
    assert saved(folder / "evaluating") == ["step_00000005"]
    assert "eval_loss" in (folder / "evaluating/metrics.jsonl").read_text().splitlines()[-1]
    monkeypatch.undo()
    monkeypatch.setattr(store, "_finish", once(1, send(signal.SIGTERM), store._finish))
    assert start(folder, "saving", "checkpoint.every=5")[0] == 75
    assert "step_00000005" in saved(folder / "saving")


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.parametrize("asked", [True, False], ids=["asked to end", "last step"])
def test_a_last_save_that_fails_is_a_failure_and_leaves_the_copies_in_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str, asked: bool
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_finish", fail)
    if asked:
        monkeypatch.setattr(NativeEngine, "step", once(6, send(signal.SIGTERM), NativeEngine.step))
    status, output = start(folder, f"full_{background}_{asked}", f"checkpoint.background={background}",
                           "checkpoint.in_memory=4", f"checkpoint.memory_dir={tmp_path}")
    assert status == 2
    assert f"no checkpoint of step {6 if asked else STEPS} could be written" in output.splitlines()[-1]
    assert "training goes on" not in output
    (copy,) = tmp_path.glob("*/*/step_*/copy.json")
    assert copy.parent.name == f"step_{4 if asked else 8:08d}"


def test_a_signal_before_the_first_step_ends_at_once_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        monkeypatch.setattr(begin, "prepare_tokens", once(1, send(number), begin.prepare_tokens))
        assert start(folder, "early")[0] == status
        monkeypatch.undo()
        assert not (folder / "early").exists()


def test_ranks_that_prepare_die_with_their_launcher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(trainer, "die_with_launcher", lambda: done.append("bound"))
    monkeypatch.setattr(begin, "prepare_tokens", once(1, lambda: done.append("prepares"), begin.prepare_tokens))
    assert start(folder, "bound")[0] == 0
    assert done == ["bound", "prepares"]


def test_a_second_interrupt_ends_a_save_and_says_that_it_was_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_twice() -> None:
        send(signal.SIGINT)()
        time.sleep(1.2)
        send(signal.SIGINT)()

    monkeypatch.setattr(Writer, "write_data", once(1, press_twice, Writer.write_data))
    status, output = start(folder, "interrupted", "checkpoint.every=5")
    assert status == 130
    assert "stopped" in output.splitlines()[-1]
    monkeypatch.undo()
    assert start(folder, "interrupted")[0] == 0
    assert losses(folder / "interrupted") == losses(folder / "whole")


def test_a_tokenizer_that_goes_away_after_the_start_ends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<|endoftext|>": 0, "[UNK]": 1, "the": 2, "quick": 3, "brown": 4, "fox": 5, "lazy": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    place = folder / "tokenizer.json"
    tokenizer.save(str(place))
    monkeypatch.setattr(NativeEngine, "step", once(2, place.unlink, NativeEngine.step))
    text = place.read_text()
    assert start(folder, "gone", f"data.tokenizer={place}", "monitor.eval_every=3", "checkpoint.every=3")[0] == 0
    assert not place.exists()
    assert (folder / "gone" / "checkpoints" / f"step_{STEPS:08d}" / "tokenizer.json").read_text() == text


MANY = 60  # steps, so that there is time to disturb them
SLOW_STEPS = ("parallel.ep=2", "data.seq_len=256", "monitor.eval_sequences=1", f"run.steps={MANY}")


def test_a_signal_to_one_rank_of_two_ends_both_after_the_same_step(folder: Path) -> None:
    launcher = launch(folder, "one_of_two", "parallel.ep=2", "run.steps=100000", restarts=1)
    wait_for_steps(launcher, folder / "one_of_two", 3)
    os.kill(ranks_of(launcher)[1], signal.SIGUSR1)
    output = end(launcher)
    assert "exitcode  : 75" in output
    assert output.count("moescale: ") == 1, "and those that torchrun starts again leave at once"
    (checkpoint,) = saved(folder / "one_of_two")
    assert losses(folder / "one_of_two")[-1][0] == int(checkpoint[5:])


def whole_on_two(folder: Path) -> list[tuple[int, float]]:
    if not (folder / "whole_on_two").exists():
        launcher = launch(folder, "whole_on_two", *SLOW_STEPS)
        output = end(launcher)
        assert launcher.returncode == 0, output
    return losses(folder / "whole_on_two")


def disturb(folder: Path, tries: int, draw: random.Random) -> None:
    """Kill a rank at a random moment, time after time, in the first attempt or a later one."""
    expected = whole_on_two(folder)
    for number in range(tries):
        run = f"killed_{number}"
        launcher = launch(folder, run, *SLOW_STEPS, "checkpoint.every=5", "run.timeout_seconds=60", restarts=3)
        time.sleep(3.0)
        deadline = time.monotonic() + draw.random() * 14
        while time.monotonic() < deadline and launcher.poll() is None:
            time.sleep(0.05)
        ranks = ranks_of(launcher)
        if ranks:
            os.kill(draw.choice(ranks), signal.SIGKILL)
        output = end(launcher)
        print(f"try {number}: killed {'one of ' + str(len(ranks)) if ranks else 'none'}, status {launcher.returncode}")
        assert launcher.returncode == 0, output
        assert losses(folder / run) == expected


def test_ranks_that_are_killed_are_started_again_and_give_the_same_losses(folder: Path) -> None:
    launcher = launch(folder, "killed", "parallel.ep=2", "run.steps=120", "checkpoint.every=20", restarts=3)
    wait_for_steps(launcher, folder / "killed", 30)
    os.kill(ranks_of(launcher)[0], signal.SIGKILL)
    before = losses(folder / "killed")
    output = end(launcher)
    assert launcher.returncode == 0, output
    assert "going on from" in output
    after = losses(folder / "killed")
    assert [step for step, _ in after] == list(range(1, 121))
    assert after[: len(before)] == before, "some of these were done twice"


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_at_the_time_out_and_is_started_again(folder: Path) -> None:
    launcher = launch(folder, "stopped", "parallel.ep=2", "run.steps=120", "checkpoint.every=20",
                      "run.timeout_seconds=5", restarts=3)
    wait_for_steps(launcher, folder / "stopped", 30)
    rank, began = ranks_of(launcher)[1], time.monotonic()
    os.kill(rank, signal.SIGSTOP)
    while Path(f"/proc/{rank}").exists() and time.monotonic() - began < 60:
        time.sleep(0.1)
    took = time.monotonic() - began
    output = end(launcher)
    print(f"the stopped rank ended after {took:.1f} s")
    assert launcher.returncode == 0, output
    assert took < 5 + 5 + 5, "the time-out, what other ranks get before, and some more for a busy machine"
    assert "did not end within run.timeout_seconds=5 (stopped by a signal), and the rank is killed" in output
    assert [step for step, _ in losses(folder / "stopped")] == list(range(1, 121))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_rank_killed_at_any_moment_changes_nothing(folder: Path) -> None:
    disturb(folder, int(os.environ.get("TRIES", "20")), random.Random(1))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_signal_at_any_moment_loses_nothing_but_the_step_under_way(folder: Path) -> None:
    expected, draw = whole_on_two(folder), random.Random(2)
    for number in range(10):
        run = f"signalled_{number}"
        launcher = launch(folder, run, *SLOW_STEPS)
        time.sleep(2.0 + draw.random() * 12)
        launcher.send_signal(signal.SIGTERM)
        output = end(launcher)
        seen = losses(folder / run) if (folder / run / "metrics.jsonl").exists() else []
        kept = saved(folder / run)
        print(f"try {number}: {len(seen)} steps logged, {kept}, status {launcher.returncode}")
        assert [f"step_{seen[-1][0]:08d}"] == kept if seen else not kept, output
        launcher = launch(folder, run, *SLOW_STEPS)
        output = end(launcher)
        assert launcher.returncode == 0, output
        assert losses(folder / run) == expected
