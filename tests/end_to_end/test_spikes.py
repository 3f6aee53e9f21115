"""A loss spike sends a run back to an earlier checkpoint and around its batches, interrupted or not."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moescale.checkpoint.background import BackgroundWriter
from moescale.checkpoint.memory import MemoryCopies
from moescale.checkpoint.remote import RemoteStorage
from moescale.comm.collectives import local_tensor
from moescale.config import ConfigError, TrainingError, parse_config
from moescale.data.batches import Batch, Batches
from moescale.engine.base import StepLosses
from moescale.engine.native import NativeEngine
from moescale.generate import load_model
from moescale.monitor.output import Output
from moescale.parallel.ranks import run_ranks
from moescale.rollback import Decision, Rollbacks
from moescale.spikes import Losses, Spikes
from moescale.trainer import train
from tests.support.groups import in_groups
from tests.support.saved import flip

BATCH = 4


def write_text(folder: Path) -> None:
    draw = random.Random(0)
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(" ".join(draw.choice(("ba", "do", "ki", "lu")) for _ in range(60)))


def run(folder: Path, name: str, steps: int, *, layout: dict[str, int] | None = None,
        checkpoint: dict[str, Any] | None = None, **spikes: Any) -> list[dict]:
    """Train or go on to a step. -> the lines of metrics.jsonl"""
    if not (folder / "text").exists():
        write_text(folder / "text")
    train(parse_config({
        "run": {"dir": str(folder / name), "steps": steps},
        "data": {"files": [str(folder / "text/*.txt")], "cache_dir": str(folder / "cache"), "seq_len": 16,
                 "global_batch": BATCH, "batch_schedule": [[8, 2 * BATCH], [10, BATCH]]},
        **in_groups({"vocab_size": 264, "d_model": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
                     "head_dim": 8, "d_ff": 16, "pattern": [{"channel_mixer": "feed_forward"}]}),
        "optim": {"lr": 1e-2, "schedule": "constant"}, "checkpoint": {"every": 4, "keep": 4, **(checkpoint or {})},
        "monitor": {"every": 2, "moved_every": None}, "parallel": layout or {},
        "spikes": {"deviations": 2.5, "window": 8, "back": 4, "skip": 6, **spikes}}, "test"))
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def poison(monkeypatch: pytest.MonkeyPatch, sequences: Any) -> list[int]:
    """Give some sequences targets without sense. -> the numbers of all sequences that are read from now on"""
    read, sequence = list[int](), Batches._sequence

    def poisoned(self: Batches, number: int) -> np.ndarray:
        read.append(number)
        parts = sequence(self, number).copy()
        if number in sequences:
            parts[1] = 200 + np.arange(parts.shape[1]) % 7
        return parts

    monkeypatch.setattr(Batches, "_sequence", poisoned)
    return read


def test_a_spike_sends_a_run_back_and_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = 18 * BATCH + 8  # of step 19 on; steps 9 and 10 are twice as large
    read = poison(monkeypatch, range(first + 2 * BATCH, first + 4 * BATCH))  # steps 21 and 22
    lines = run(tmp_path, "run", 30)
    assert [line["step"] for line in lines] == list(range(2, 31, 2))
    assert [line["rollbacks"] for line in lines] == 8 * [0] + 7 * [1]
    (alert,) = [text for line in lines for text in line.get("alerts", []) if "went back" in text]
    assert "at step 21; went back to step 16, and left out 24 sequences" in alert
    back = 16 * BATCH + 8
    assert read == [*range(first + 4 * BATCH), *range(back + 6 * BATCH, back + 20 * BATCH)]
    state = json.loads((tmp_path / "run/checkpoints/step_00000030/checkpoint.json").read_text())["state"]
    assert (state["sequences"], state["tokens"]) == (back + 20 * BATCH, 16 * (30 * BATCH + 8))

    for stop in (22, 26):  # cut off at the spike, and after going back
        name = f"cut at {stop}"
        run(tmp_path, name, stop)
        again = run(tmp_path, name, 30)
        assert [line["loss"] for line in again if line["step"] % 2 == 0] == [line["loss"] for line in lines]
    whole, cut = (load_model(tmp_path / name)[0].state_dict() for name in ("run", "cut at 26"))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())

    off = run(tmp_path, "off", 30, deviations=None)
    assert max(line["loss_max"] for line in off) > 2 * lines[-1]["loss"]
    assert not any("rollbacks" in line for line in off)


def test_spikes_without_end_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, range(16 * BATCH, 10_000))
    with pytest.raises(TrainingError, match=r"after the run went back spikes\.most=1 times"):
        run(tmp_path, "run", 30, most=1, window=2, deviations=0.5)


def test_what_is_a_spike() -> None:
    config = parse_config({"spikes": {"deviations": 3.0, "window": 4}, "checkpoint": {"every": 100}}, "test").spikes
    spikes = Spikes(config, {})
    assert spikes.find([9.0, 1.0, 5.0]) is None, "too few are known"
    assert spikes.find([4.0, 4.1]) is None
    assert spikes.find([4.0, 99.0]) == 1
    known = spikes.known
    assert Spikes(config, {"losses": json.loads(json.dumps(list(vars(known).values())))}).known == known
    steady = Losses()
    for loss in (2.0, 4.0, 2.0, 4.0):
        steady = steady.and_then(loss, 4)
    assert (steady.mean, steady.variance) == (3.0, 1.0), "at first plain mean and variance"


def spoil(
    monkeypatch: pytest.MonkeyPatch, sequences: Any, rank: int | None = None, *, loss: bool = False
) -> None:
    """Let the gradient of one weight be no finite number in steps that see some sequence, and the loss if wanted.

    rank: alone, if given.
    """
    forward_backward, read = NativeEngine.forward_backward, poison(monkeypatch, ())

    def spoilt(self: NativeEngine, batches: list[Batch], **options: Any) -> StepLosses:
        losses = forward_backward(self, batches, **options)
        seen = set(read)
        read.clear()
        if seen & set(sequences) and rank in (None, self.mesh.rank):
            next(grad for name, parameter in self.parameters().items() if name == SPOILT
                 for grad in [local_tensor(parameter.grad)] if grad.numel()).view(-1)[0] = float("nan")
            return replace(losses, cross_entropy=losses.cross_entropy + torch.inf) if loss else losses
        return losses

    monkeypatch.setattr(NativeEngine, "forward_backward", spoilt)


SPOILT = "blocks.0.mixer.q.weight"
TWENTY_ONE = range(20 * BATCH + 8, 21 * BATCH + 8)  # the sequences of step 21


def test_a_step_that_is_not_finite_stops_a_run_before_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, TWENTY_ONE)
    with pytest.raises(TrainingError, match=rf"^step 21: loss [\d.]+, gradient norm nan, of the gradients that of "
                                            rf"{SPOILT}; try .*step_00000020: remove it"):
        run(tmp_path, "run", 30, deviations=None)
    assert not (tmp_path / "run/checkpoints/step_00000024").exists()


@pytest.mark.parametrize("step", [21, 22], ids=["between two lines", "of a line"])
def test_an_update_that_is_not_finite_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    first = (step - 1) * BATCH + 8
    spoil(monkeypatch, range(first, first + BATCH), loss=step == 22)
    lines = run(tmp_path, "run", 30, not_finite="skip", deviations=None)
    (alert,) = [text for line in lines for text in line.get("alerts", []) if "left out" in text]
    assert f"gradient norm nan, of the gradients that of {SPOILT} at step {step}; its update is left out" in alert
    assert [line["step"] for line in lines if "loss" not in line] == ([22] if step == 22 else [])
    run(tmp_path, "cut", step, not_finite="skip", deviations=None)
    run(tmp_path, "cut", 30, not_finite="skip", deviations=None)
    whole, cut = (load_model(tmp_path / name)[0].state_dict() for name in ("run", "cut"))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


def test_updates_are_not_left_out_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, range(16 * BATCH, 10_000))
    with pytest.raises(TrainingError, match=r"after the updates of spikes\.most=3 steps in a row were left out"):
        run(tmp_path, "run", 30, not_finite="skip", most=3)


@pytest.mark.parametrize("fails", [False, True], ids=["", "a storage that keeps all"])
def test_a_run_that_goes_back_lets_go_of_later_steps_in_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    spoil(monkeypatch, TWENTY_ONE)
    url, there, go_back = f"file://{tmp_path}/elsewhere", list[list[int]](), Output.go_back
    if fails:
        monkeypatch.setattr(RemoteStorage, "_remove", lambda *_: 1 / 0)
    monkeypatch.setattr(Output, "go_back", lambda self, *args: (
        there.append(RemoteStorage(url).steps()), go_back(self, *args))[1])
    lines = run(tmp_path, "run", 22, not_finite="back", deviations=None, back=8, checkpoint={"keep": 6, "url": url})
    assert there == [[4, 8, 12, 16, 20] if fails else [4, 8, 12]]
    assert RemoteStorage(url).steps() == [4, 8, 12, 16, 20, 22]
    told = [text for text in alerts_of(lines) if "could not be removed from file://" in text]
    assert len(told) == fails


def test_a_run_goes_back_from_a_step_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, TWENTY_ONE)
    lines = run(tmp_path, "run", 30, not_finite="back", deviations=None)
    (alert,) = [text for line in lines for text in line.get("alerts", []) if "went back" in text]
    assert f"that of {SPOILT} at step 21; went back to step 16, and left out 24 sequences" in alert
    assert [line["rollbacks"] for line in lines] == 8 * [0] + 7 * [1]


def damage_at_twenty(monkeypatch: pytest.MonkeyPatch, *files: Path) -> None:
    """Change a bit of each file before what comes after step 20 is looked at first."""
    decide = Rollbacks.decide

    def damage(self: Rollbacks, first: int, steps: Any) -> Decision:
        if first == 20 and self.count == 0:
            self.saver.finish()
            for file in files:
                flip(file)
        return decide(self, first, steps)

    monkeypatch.setattr(Rollbacks, "decide", damage)


def alerts_of(lines: list[dict]) -> list[str]:
    return [text for line in lines for text in line.get("alerts", [])]


@pytest.mark.parametrize(("file", "problem"), [
    ("__0_0.distcp", "__0_0.distcp was altered"), ("checkpoint.json", "its checkpoint.json cannot be read")])
def test_a_damaged_checkpoint_is_not_gone_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, problem: str
) -> None:
    spoil(monkeypatch, TWENTY_ONE)
    kept = tmp_path / "run/checkpoints"
    damage_at_twenty(monkeypatch, kept / "step_00000016" / file)
    if file == "checkpoint.json":
        monkeypatch.setattr("tests.end_to_end.test_spikes.flip", lambda file: file.write_text("{"))
    first, second = alerts_of(run(tmp_path, "run", 30, not_finite="back", deviations=None, back=3))
    assert first == (f"step_00000016 is damaged: {problem}; it is kept as step_00000016.damaged, and the run goes back "
                     "to step_00000012")
    assert "went back to step 12" in second
    assert (kept / "step_00000016.damaged").is_dir()


@pytest.mark.parametrize("spike", [True, False], ids=["spike", "not finite"])
def test_nothing_newer_is_removed_where_no_whole_checkpoint_is_old_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spike: bool
) -> None:
    if spike:
        poison(monkeypatch, TWENTY_ONE)
    else:
        spoil(monkeypatch, TWENTY_ONE)
    kept, present = tmp_path / "run/checkpoints", list[list[str]]()
    damage_at_twenty(monkeypatch, kept / "step_00000016/__0_0.distcp")
    before = Rollbacks._checkpoint_before

    def find(self: Rollbacks, *args: Any) -> Path | None:
        found = before(self, *args)
        present.append(sorted(folder.name for folder in kept.iterdir()))
        return found

    monkeypatch.setattr(Rollbacks, "_checkpoint_before", find)
    told, tell = list[str](), Output.tell
    monkeypatch.setattr(Output, "tell", lambda self, *notes: (told.extend(notes), tell(self, *notes))[1])
    words = "and no whole checkpoint lies spikes.back=4 steps before to go back to"
    keys = {"checkpoint": {"keep": 2}}
    if spike:
        run(tmp_path, "run", 22, **keys)
    else:
        with pytest.raises(TrainingError, match=words):
            run(tmp_path, "run", 22, not_finite="back", deviations=None, **keys)
    assert present[0] == ["step_00000016.damaged", "step_00000020"]
    damaged, *others = told
    assert damaged == ("step_00000016 is damaged: __0_0.distcp was altered; it is kept as step_00000016.damaged, and "
                       "no checkpoint before it is whole")
    assert [f"at step 21, {words}, so that training goes on" in text for text in others] == [True] * spike


def test_what_is_newer_and_cannot_be_removed_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise OSError(13, "Permission denied")

    spoil(monkeypatch, TWENTY_ONE)
    monkeypatch.setattr("moescale.saving.remove_after", refuse)
    with pytest.raises(ConfigError, match=r"newer than .*step_00000016, to which .*: permission denied; remove it and"):
        run(tmp_path, "run", 30, not_finite="back", deviations=None)


def spoil_moment(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let a second moment be infinite after this step, once: its weight stands still, and no loss shows it."""
    real, left = NativeEngine.step, [True]

    def spoilt(self: NativeEngine, *args: Any) -> torch.Tensor:
        norm = real(self, *args)
        if self.step_count == step and left:
            left.clear()
            local_tensor(self.capture({}, {}).tensors[MOMENT]).view(-1)[0] = torch.inf
        return norm

    monkeypatch.setattr(NativeEngine, "step", spoilt)


MOMENT = f"optim.exp_avg_sq.{SPOILT}"


@pytest.mark.parametrize(("step", "keys", "saved", "back_to"), [
    (19, {}, 20, 16), (19, {"background": False}, 20, 16), (29, {}, 30, 24)], ids=["later", "at once", "at the end"])
def test_a_run_goes_back_from_a_state_that_may_not_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, keys: dict[str, bool], saved: int, back_to: int
) -> None:
    spoil_moment(monkeypatch, step)
    removed = list[str]()
    monkeypatch.setattr(MemoryCopies, "remove", lambda _: removed.append("the place of copies"))
    kept = {"in_memory": 3, "memory_dir": str(tmp_path)}
    lines = run(tmp_path, "run", 30, checkpoint={**kept, **keys}, not_finite="back", deviations=None)
    assert len(removed) == 1, "when the run ends, and not before"
    (alert,) = [text for line in lines for text in line.get("alerts", []) if "went back" in text]
    assert f"not finite: {MOMENT}, which was to be saved, at step {saved}; went back to step {back_to}," in alert
    assert [line["step"] for line in lines] == list(range(2, 31, 2))
    assert lines[-1]["rollbacks"] == 1
    assert (tmp_path / "run/checkpoints/step_00000030").is_dir()


@pytest.mark.parametrize(("answer", "words"), [
    ("stop", "; try a lower"), ("skip", "write spikes.not_finite=back; try a lower")])
def test_a_state_that_may_not_be_saved_ends_a_run_that_does_not_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, words: str
) -> None:
    spoil_moment(monkeypatch, 19)
    with pytest.raises(TrainingError, match=rf"^step 20: {MOMENT} holds values that are no finite numbers, and nothing "
                                            rf"was saved.*{words}.*step_00000016: remove it"):
        run(tmp_path, "run", 30, not_finite=answer, deviations=None)


def run_saving(folder: Path) -> list[str]:
    """Train on ranks of which only the first one hears during training that a save has ended."""
    with pytest.MonkeyPatch.context() as patch:
        spoil_moment(patch, 19)
        if os.environ["RANK"] != "0":
            patch.setattr(BackgroundWriter, "is_over", False)
        lines = run(folder, "run", 30, not_finite="back", deviations=None, layout={"dp_replicate": 2})
    return [text for line in lines for text in line.get("alerts", [])]


def test_all_ranks_go_back_when_one_hears_of_a_state_that_may_not_be_saved(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    (first, _) = run_ranks(2, run_saving, tmp_path, timeout_seconds=40)
    assert len(first) == 1
    assert "went back to step 16" in first[0]


def run_alone(folder: Path, layout: dict[str, int], answer: str, rank: int) -> list[str]:
    """Train on ranks of which one alone sees what is not finite. -> what rank 0 wrote of it"""
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, TWENTY_ONE, rank)
        lines = run(folder, "run", 30, not_finite=answer, deviations=None, layout=layout)
    return [text for line in lines for text in line.get("alerts", []) if "not finite" in text]


@pytest.mark.parametrize(("answer", "words"), [("skip", "left out"), ("back", "went back to step 16")])
def test_all_ranks_decide_alike_about_what_one_sees(tmp_path: Path, answer: str, words: str) -> None:
    write_text(tmp_path / "text")
    said = run_ranks(2, run_alone, tmp_path, {"dp_replicate": 2}, answer, 1, timeout_seconds=60)
    assert len(said[0]) == 1
    assert words in said[0][0]
    assert f"{SPOILT} (rank 1)" in said[0][0]


@pytest.mark.parametrize(("keys", "advice"), [
    ({"spikes": {"not_finite": "back"}, "checkpoint": {"every": 30}}, "write checkpoint.keep=5"),
    ({"checkpoint": {"every": 30}}, "write checkpoint.keep=5"),
    ({"checkpoint": {"every": 100, "every_minutes": 5}}, "write checkpoint.every_minutes=null"),
])
def test_checkpoints_that_are_not_there_to_go_back_to_are_refused(keys: dict, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        parse_config(yaml.safe_load(json.dumps({"spikes": {"deviations": 3.0}, **keys})), "test")
