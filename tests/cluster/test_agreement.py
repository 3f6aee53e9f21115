"""Ranks settle things before they compute, and speak with one voice when they end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescale.cluster import agreement, directory
from moescale.cluster.agreement import Agreement, ranks_text
from moescale.cluster.directory import choose_checkpoint, shared_directory
from moescale.cluster.identity import describe_run, refuse_differences
from moescale.cluster.launch import Launch, read_launch
from moescale.config import Config, ConfigError, LostRanksError, Silenced, Stopped, parse_config
from moescale.parallel.ranks import run_ranks
from tests.support.saved import flip, save


def met(work: Callable[..., Any], *args: Any) -> tuple[str, int | str]:
    """Meet as this rank, and do something. -> how it ended, and the words or the status of it"""
    ranks = Agreement(read_launch())
    try:
        with ranks.one_voice():
            ranks.meet(20)
            return "good", work(ranks, *args)
    except Silenced as end:
        return "silent", end.status
    except (ConfigError, LostRanksError, RuntimeError) as error:
        return "said", "; ".join([str(error), *getattr(error, "__notes__", [])])


def settle_twice(ranks: Agreement) -> Any:
    first = ranks.settle(ranks.launch.rank, sum)
    return [first, ranks.settle(ranks.launch.rank * 10, max), len(ranks.hosts)]


def test_rank_0_chooses_from_what_all_say() -> None:
    assert run_ranks(3, met, settle_twice, timeout_seconds=40) == [("good", [3, 20, 3])] * 3


def fail_on(ranks: Agreement, who: int, error: Exception) -> None:
    def work() -> None:
        if ranks.launch.rank in (who, -who):
            raise error

    ranks.together(work)
    ranks.settle(None, len)
    if ranks.launch.rank == 2:
        raise RuntimeError("only rank 2 comes so far")
    ranks.settle(None, len)


def test_an_error_of_one_rank_is_said_once_by_name() -> None:
    results = run_ranks(3, met, fail_on, 1, ConfigError("no such file: text"), timeout_seconds=40)
    host = read_launch().host
    assert results == [("said", f"rank 1 on {host}: no such file: text"), ("silent", 2), ("silent", 2)]


def test_what_no_rank_expects_is_said_by_the_rank_that_meets_it() -> None:
    """Others are waiting for it, and leave with the same status."""
    results = run_ranks(3, met, fail_on, 5, ConfigError(""), timeout_seconds=40)
    said = f"only rank 2 comes so far; this happened on rank 2 on {read_launch().host}"
    assert results == [("silent", 1), ("silent", 1), ("said", said)]


def test_a_rank_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(agreement, "FAREWELL_SECONDS", 0.1)

    def outside(ranks: Agreement) -> Any:
        if ranks.launch.rank == 1:
            ranks._beating.set()  # as good as dead: it says no more that it lives
            time.sleep(4)
            return None
        ranks._patience = 1.0
        return ranks.settle(None, len)

    said = run_ranks(2, met, outside, timeout_seconds=40)[0]
    assert said[0] == "said"
    assert "nothing was heard of rank 1" in str(said[1])


def meet_again(attempts: int) -> list[tuple[str, Any]]:
    """Find each other anew in a store that still holds what those before said, as after a launcher's restart."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    first = Agreement(read_launch())
    first.meet(20)
    results: list[tuple[str, Any]] = [("good", first.settle(first.launch.rank, sum))]
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    for attempt in range(1, attempts):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        results.append(met(lambda ranks: ranks.settle(ranks.launch.rank, sum)))
    first._say_goodbye()  # the store lives in the first rank
    return results


def test_ranks_that_are_started_again_find_each_other_in_the_same_store() -> None:
    assert run_ranks(3, meet_again, 3, timeout_seconds=60) == [[("good", 3)] * 3] * 3


def stopped_before(ranks: int) -> tuple[str, bool]:
    first = Agreement(read_launch())
    first.meet(20)
    assert first._kept is not None
    first._kept.set("stopped", json.dumps({"status": 75, "size": ranks}))
    first.settle(0, len)
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    outcome, _ = met(settle_twice)
    known = first._kept.check(["stopped"])
    first._say_goodbye()
    return outcome, known


def test_ranks_that_left_when_asked_to_are_not_started_again() -> None:
    assert run_ranks(2, stopped_before, 2, timeout_seconds=40) == [("silent", True)] * 2


def test_ranks_that_torchrun_stopped_since_others_came_are_started_again() -> None:
    """The word of those that stopped counts for as many ranks as they were, and once."""
    assert run_ranks(2, stopped_before, 1, timeout_seconds=40) == [("good", False)] * 2


@pytest.mark.parametrize(("restarts", "kind"), [(0, Stopped), (1, Silenced)])
def test_one_that_is_started_again_leaves_in_silence_when_torchrun_ends_it(restarts: int, kind: type) -> None:
    ranks = Agreement(Launch(size=2, restarts=restarts, elastic=True))
    with pytest.raises(kind) as ended, ranks.one_voice():
        raise Stopped("stopped by SIGTERM before the first step", 75)
    assert ended.value.status == 75


class Gone:
    """A store whose keeper has left."""

    def check(self, *words: object) -> bool:
        raise RuntimeError("Connection reset by peer")

    compare_set = check


@pytest.mark.parametrize(("rank", "kind"), [(0, Stopped), (1, Silenced)])
def test_a_stop_is_told_by_rank_0_where_another_comes_after_it_has_left(
    rank: int, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Agreement(Launch(rank=rank, size=2))
    monkeypatch.setattr(ranks, "store", Gone())
    with pytest.raises(kind) as ended, ranks.one_voice():
        raise Stopped("stopped by SIGUSR1 after step 2 of 9", 75)
    assert ended.value.status == 75


def alone_of_two(rank: int) -> tuple[str, Any]:
    if rank != read_launch().rank:
        return "absent", 0
    ranks = Agreement(read_launch())
    try:
        ranks.meet(1.5)
    except ConfigError as error:
        return "said", str(error)
    return "good", 0


@pytest.mark.parametrize(("rank", "named"), [(0, "1 of 2 ranks came"), (1, "did not find rank 0")])
def test_a_meeting_to_which_nobody_comes_ends_in_time(rank: int, named: str) -> None:
    started = time.monotonic()
    results = run_ranks(2, alone_of_two, rank, timeout_seconds=40)
    assert time.monotonic() - started < 15
    assert named in results[rank][1]
    assert "run.timeout_seconds=1.5" in results[rank][1]


def test_a_host_that_no_one_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=no\.such\.host\.invalid.*no host of this name"):
        Agreement(read_launch()).meet(1)


def config(**groups: dict[str, Any]) -> Config:
    return parse_config({"data": {"micro_batch": 1}, **groups}, "test").for_world(1)


def compare(ranks: Agreement, configs: list[Config]) -> None:
    refuse_differences(ranks, describe_run(configs[ranks.launch.rank]), "mend it")


@pytest.mark.parametrize(("changes", "values"), [
    ({"optim": {"lr": 0.5}}, ("optim.lr", "0.001", "0.5")), ({"run": {"seed": 7}}, ("run.seed", "0", "7")),
    ({"run": {"dir": "elsewhere"}}, ("run.dir", "runs/default", "elsewhere")),
    ({"run": {"timeout_seconds": 40.0}}, ("run.timeout_seconds", "300", "40")),
    ({"moe": {"load_balance_coefficient": 5.0}}, ("moe.load_balance_coefficient", "5")),
    ({"parallel": {"recompute": "full"}}, ("parallel.recompute", "none", "full")),
    ({"monitor": {"every": 3}}, ("monitor.every", "10", "3")),
])
def test_a_rank_of_another_configuration_is_named_with_key_and_values(changes: dict, values: tuple[str, ...]) -> None:
    results = run_ranks(2, met, compare, [config(), config(**changes)], timeout_seconds=40)
    assert results[1] == ("silent", 2)
    assert results[0][0] == "said"
    for word in (*values, "rank 0", "rank 1", read_launch().host):
        assert word in str(results[0][1])


def compare_versions(ranks: Agreement, names: list[str]) -> None:
    facts = describe_run(config())
    others = {name: f"another {name}" for name in names if name in facts}
    refuse_differences(ranks, facts | others if ranks.launch.rank == 1 else facts, "mend it")


def test_a_rank_with_other_software_is_named() -> None:
    names = ["the code of moescale", "the version of torch", "the version of Python", "the version of CUDA",
             "the kind of device"]
    said, silent = run_ranks(2, met, compare_versions, names, timeout_seconds=40)
    assert silent == ("silent", 2)
    for name in names:
        assert f"{name} is " in str(said[1])
        assert f"another {name} on rank 1 ({read_launch().host})" in str(said[1])


def test_paths_of_a_node_may_differ() -> None:
    own = config(data={"cache_dir": "/tmp/own", "micro_batch": 1})
    assert run_ranks(2, met, compare, [config(), own], timeout_seconds=40) == [("good", None)] * 2


def see(ranks: Agreement, places: list[Path]) -> Any:
    """Look for the run directory and its last checkpoint, at a place of each rank's own."""
    directory.SHARED_SECONDS = 1.0  # type: ignore[assignment]
    os.chdir(places[ranks.launch.rank])
    with shared_directory(ranks, "run") as run_dir:
        found, notes = choose_checkpoint(ranks, run_dir)
        return None if found is None else " ".join((found.name, *notes))


def make_checkpoint(run_dir: Path, step: int) -> Path:
    return save(run_dir, step, keep=9)


def test_a_directory_that_is_not_shared_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    results = run_ranks(2, met, see, places, timeout_seconds=40)
    assert results[1] == ("silent", 2)
    assert "run.dir=run" in str(results[0][1])
    assert "rank 1" in str(results[0][1])
    assert read_launch().host in str(results[0][1])
    assert sorted(tmp_path.rglob("*")) == places


def test_all_ranks_go_on_from_the_checkpoint_that_rank_0_chooses(tmp_path: Path) -> None:
    assert run_ranks(2, met, see, [tmp_path] * 2, timeout_seconds=40) == [("good", None)] * 2
    make_checkpoint(tmp_path / "run", 5)
    make_checkpoint(tmp_path / "run", 10)
    assert run_ranks(2, met, see, [tmp_path] * 2, timeout_seconds=40) == [("good", "step_00000010")] * 2
    assert not list((tmp_path / "run").glob(".probe*"))


def test_of_damaged_checkpoints_the_one_before_is_taken(tmp_path: Path) -> None:
    damages: dict[int, tuple[Callable[[Path], object], str]] = {
        25: (lambda folder: flip(folder / "__0_0.distcp"), "__0_0.distcp was altered"),
        20: (lambda folder: (folder / "config.yaml").unlink(), "config.yaml is missing"),
        15: (lambda folder: (folder / ".metadata").write_bytes(b""), ".metadata has 0 of "),
        10: (lambda folder: (folder / "checkpoint.json").write_text("{"), "its checkpoint.json cannot be read")}
    names = {step: f"step_{step:08d}" for step in (5, *damages)}
    for step in names:
        make_checkpoint(tmp_path / "run", step)
    for step, (spoil, _) in damages.items():
        spoil(tmp_path / "run/checkpoints" / names[step])
    results = run_ranks(2, met, see, [tmp_path] * 2, timeout_seconds=40)
    assert results[0] == results[1]
    kind, said = results[0]
    assert kind == "good"
    assert str(said).startswith(f"{names[5]} ")
    for step, (_, problem) in damages.items():
        assert f"{names[step]} is damaged: {problem}" in str(said)
        assert f"it is kept as {names[step]}.damaged, and the run goes on from {names[5]}" in str(said)
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {
        names[5], *(f"{names[step]}.damaged" for step in damages)}
    flip(tmp_path / f"run/checkpoints/{names[5]}/__0_0.distcp")
    _, said = run_ranks(2, met, see, [tmp_path] * 2, timeout_seconds=40)[0]
    assert "all checkpoints in" in str(said)
    assert (tmp_path / f"run/checkpoints/{names[5]}").is_dir(), "no run begins anew by itself"


def late(ranks: Agreement, place: Path, spoil: str, seconds: float) -> Any:
    """Rank 1 sees the newest checkpoint late, in part, or another one of that name."""
    if ranks.launch.rank == 1:
        began, real = time.monotonic(), directory._lacking

        def lacking(folder: Path, manifest: str) -> str | None:
            assert folder.name == "step_00000010", "rank 0's, not this rank's own choice"
            return spoil if time.monotonic() - began < seconds else real(folder, manifest)

        directory._lacking = lacking
    return see(ranks, [place, place])


@pytest.mark.parametrize("seconds", [0.5, 9.0])
def test_a_checkpoint_that_one_rank_sees_late_is_waited_for_or_refused(tmp_path: Path, seconds: float) -> None:
    for step in (5, 10):
        make_checkpoint(tmp_path / "run", step)
    results = run_ranks(2, met, late, tmp_path, "no checkpoint.json in", seconds, timeout_seconds=40)
    if seconds < 1:
        assert results == [("good", "step_00000010")] * 2
        return
    assert results[1] == ("silent", 2)
    assert "rank 1" in str(results[0][1])
    assert "step_00000010" in str(results[0][1])


def test_ranks_are_written_as_spans() -> None:
    assert ranks_text([1]) == "rank 1"
    assert ranks_text([3, 0, 1, 2, 7]) == "ranks 0-3, 7"
