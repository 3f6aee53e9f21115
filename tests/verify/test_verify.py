"""The proof proves: it passes what is right, and finds and names each of six planted faults."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

from moescale.cli import app
from moescale.comm.sequence_shards import SharedSequenceShards
from moescale.config import ConfigError, load_config, parse_config
from moescale.data.batches import Batch
from moescale.engine.native import NativeEngine
from moescale.model.language_model import LanguageModel
from moescale.moe.routers import base
from moescale.parallel import fsdp
from moescale.parallel.context import ContextAttention
from moescale.verify.candidates import Layout, every_layout, layouts_of, parse_layouts, sample_layouts
from moescale.verify.main import verify
from moescale.verify.run import LayoutResult, Proof, make_cases, prepare, try_layouts
from moescale.verify.shrink import shrink
from tests.support.groups import in_groups

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SEED = 20261128  # the same in every run of the suite; the sample of the day draws its own
RUN = parse_config({
    **in_groups({"num_layers": 2, "window": 64, "init": "fan_in", "tied_embeddings": True, "z_loss_coefficient": 1e-4}),
    "moe": {"router": "gshard", "capacity_factor": 1.0, "jitter": 0.01, "router_z_coefficient": 1e-3},
}, "test")


@pytest.fixture(scope="module")
def proof() -> Proof:
    """One process's step, before anything is planted."""
    return prepare(shrink(RUN, [Layout(tp=2), Layout(pp=2), Layout(cp=2), Layout(dp_shard=2, ep=2)]), SEED)


def try_one(proof: Proof, layout: Layout) -> LayoutResult:
    return next(try_layouts(proof, [layout], 100))


@pytest.mark.slow
def test_sample_of_the_day() -> None:
    """Another router each day, another extent of recompute, other layouts; the printed seed tries the same again."""
    today = int(datetime.date.today().strftime("%Y%m%d"))
    router = ({"router": "mixtral", "capacity_factor": None}, {"router": "gshard"}, {"router": "switch", "top_k": 1},
              {"router": "sigmoid_bias", "capacity_factor": None, "bias_update_rate": 0.05, "num_shared_experts": 1},
              {"router": "expert_choice", "capacity_factor": 2.0},
              {"router": "gshard", "drop_by": "probability", "balance_over": "global_batch"},
              {"router": "switch", "top_k": 1, "left_behind_choices": 2, "balance_over": "micro_batch"},
              {"router": "sinkhorn", "eval_capacity_factor": 1.5, "balance_over": "global_batch"})
    moe = RUN.moe.model_copy(update=router[today % len(router)])
    recompute = ("none", "selective", "full")[today // 3 % 3]
    parallel = RUN.parallel.model_copy(update={"recompute": recompute})
    config = RUN.model_copy(update={"moe": moe, "parallel": parallel})
    layouts = sample_layouts(config, today, count=3)
    print(f"seed {today}: {moe.router}, recompute {recompute}, {', '.join(map(str, layouts))}")
    for row in try_layouts(prepare(shrink(config, layouts), today), layouts, 120):
        assert not row.diagnosis, f"{row.layout}: {row.diagnosis}"


def double_expert_gradients(engine: NativeEngine, batches: Sequence[Batch], whole: Callable[..., Any]) -> Any:
    losses = whole(engine, batches)
    for name, parameter in engine.model.named_parameters():
        if ".experts." in name:
            parameter.grad *= 2
    return losses


def leave_routers_out(shared: Callable[..., Any], block: nn.Module, *arguments: Any) -> Any:
    """Set apart what tp does not cut, except the router, which then counts as something that tp cuts."""
    router = block.channel_mixer.router
    block.channel_mixer.router = None
    units = shared(block, *arguments)
    block.channel_mixer.router = router
    return units


FAULTS = {  # what is planted: where, what to replace, what with, the layout, and what the diagnosis must name
    "expert gradients doubled": (
        NativeEngine, "forward_backward", lambda whole: lambda engine, batches: double_expert_gradients(
            engine, batches, whole), Layout(dp_shard=2, ep=2), ["expert gradients 2.000 times too large"]),
    "router gradients not added up over tp": (
        fsdp, "_shard_uncut", lambda whole: partial(leave_routers_out, whole), Layout(tp=2),
        ["router gradients", "channel_mixer.router.weight"]),
    "balance loss divided by ep": (
        base, "load_balance_loss", lambda whole: lambda *arguments: whole(*arguments) / 2,
        Layout(dp_shard=2, ep=2), ["load-balance loss only 0.500 times as large"]),
    "a micro-batch dropped": (
        NativeEngine, "forward_backward", lambda whole: lambda engine, batches: whole(engine, batches[:2]),
        Layout(dp_shard=2, ep=2), ["tokens", "0.6", "micro-batches 3"]),
    "a stage's auxiliary losses lost": (
        LanguageModel, "_features", lambda whole: lambda model, x, losses, *others: whole(
            model, x, losses if losses is None else losses * 0, *others),
        Layout(pp=2), ["load-balance loss", "router z-loss"]),
    "a window off by one": (
        ContextAttention, "_first_key", lambda whole: staticmethod(
            lambda query, window: whole(query, window if window is None else window - 1)),
        Layout(cp=2), ["features after the mixer of layer 0"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found_and_named(proof: Proof, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, change, layout, expected = FAULTS[fault]
    monkeypatch.setattr(place, name, change(getattr(place, name)))
    row = try_one(proof, layout)
    assert row.figures, row.diagnosis  # it ran to the end: what is found is a figure, not an exception
    for words in expected:
        assert words in row.diagnosis


def test_a_recurrence_that_is_cut_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that is not handed on from rank to rank, and one that passes through the beginning of a document.

    The latter takes three pieces at least: one before the document, one in which it begins, and one behind.
    """
    run = parse_config({"model": {"num_layers": 1, "init": "fan_in", "pattern": [
        {"mixer": "mamba", "channel_mixer": "feed_forward"}]}}, "test")
    proof, layout = prepare(shrink(run, [Layout(cp=4)]), SEED), Layout(cp=4)
    assert not try_one(proof, layout).diagnosis
    whole = SharedSequenceShards.first_states
    for fault in (lambda *arguments: whole(*arguments) * 0,
                  lambda self, last, passes, positions: whole(self, last, passes, positions + 1)):
        monkeypatch.setattr(SharedSequenceShards, "first_states", fault)
        assert "features after the mixer of layer 0" in try_one(proof, layout).diagnosis


def test_hanging_ranks_are_named(proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeEngine, "forward_backward", lambda *_: time.sleep(99))
    assert "did not end in 5 s" in next(try_layouts(proof, [Layout(tp=2)], 5)).diagnosis


@pytest.mark.parametrize("name", ["quickstart", "mixtral_8x22b", "palm_540b", "switch_base", "gshard_600b"])
def test_every_layout_fits_the_shrunk_run(name: str) -> None:
    """Whatever fits the user's run fits the small one, alone and with others, and the structure stays."""
    config = load_config(CONFIGS / f"{name}.yaml")
    for ranks in (1, 2, 4, 6, 8):
        layouts = every_layout(config, ranks)
        assert layouts
        small = shrink(config, layouts)
        for turn, layout in enumerate(layouts):
            make_cases(small, layout, turn)
            make_cases(shrink(config, [layout]), layout, turn)
        assert small.model.pattern == config.model.pattern
        assert small.moe.router == config.moe.router
        assert small.moe.top_k == config.moe.top_k
        assert (small.moe.num_experts > small.moe.top_k) == (config.moe.num_experts > config.moe.top_k)
        assert (small.attention.num_kv_heads == 1) == (config.attention.num_kv_heads == 1)
        assert (small.attention.num_kv_heads == small.attention.num_heads) == (
            config.attention.num_kv_heads == config.attention.num_heads)


def test_shared_key_heads_fit_without_other_layouts() -> None:
    run = parse_config({**in_groups({"num_heads": 8, "num_kv_heads": 4})}, "test")
    small = shrink(run, parse_layouts("tp8", run))
    assert make_cases(small, Layout(tp=8), 0)
    assert small.attention.num_kv_heads < 8


def test_what_cannot_be_proven_is_one_line() -> None:
    alone = {"model": {"num_layers": 1}, "data": {"global_batch": 1, "micro_batch": 1, "seq_len": 255}}
    with pytest.raises(ConfigError, match=r"^no layout of 2 or of 4 ranks fits this configuration: name some"):
        sample_layouts(parse_config(alone, "test"), 0)
    with pytest.raises(ConfigError, match=r"^parallel.over_budget=drop leaves out other rows in every layout"):
        verify(parse_config({"parallel": {"row_budget": 2, "over_budget": "drop"}}, "test"))


@pytest.mark.parametrize(("text", "message"), [
    ("tp2, qp2", "layout 'qp2': 'qp2' is not known: write dp2, rep2, tp2, pp2, cp2, ep2 or etp2"),
    ("tp2 tp4", "names tp twice"),
    (" , ", "names no layout"),
    ("dp2 ep4", "nearest that fit 2 ranks: dp2 ep2"),
    ("pp4 tp2", "model.num_layers=2"),
    ("dp512", "use at most 64"),
])
def test_bad_layout_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_layouts(text, RUN)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layouts_are_read_and_enumerated() -> None:
    assert parse_layouts("tp2 ep4, pp=2 rep2,ep2", RUN) == [
        Layout(tp=2, dp_shard=2, ep=4), Layout(pp=2, dp_replicate=2), Layout(dp_shard=2, ep=2)]
    assert [str(layout) for layout in layouts_of(RUN, 1)] == ["dp1"]
    assert {str(layout) for layout in layouts_of(RUN, 2)} == {
        "dp2", "dp2 ep2", "dp2 etp2", "tp2", "tp2 ep2", "tp2 etp2", "pp2", "cp2", "cp2 ep2", "cp2 etp2", "rep2"}
    assert sample_layouts(RUN, SEED) == sample_layouts(RUN, SEED)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text(RUN.to_yaml())
    command = ["verify", str(tmp_path / "run.yaml"), "attention.window=null", "--layouts"]
    runner = CliRunner()
    result = runner.invoke(app, [*command, "pp2", "--json", str(tmp_path / "out.json"), "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert "about" in result.output
    assert "1 of 1 layouts train as one process does" in result.output
    (row,) = json.loads((tmp_path / "out.json").read_text())["layouts"]
    assert row["ok"]
    assert {(case["micro_batches"], case["compute"]) for case in row["cases"]} == {
        (1, "float32"), (1, "float64"), (3, "float32"), (3, "float64")}
    place, name, change, *_ = FAULTS["expert gradients doubled"]
    whole = getattr(place, name)
    monkeypatch.setattr(place, name, lambda engine, batches: (
        change(whole) if engine.mesh.world_size > 1 else whole)(engine, batches))
    result = runner.invoke(app, [*command, "ep2"])
    assert result.exit_code == 1
    assert "FAILS" in result.output
    result = runner.invoke(app, [*command, "dp2 ep4"])
    assert result.exit_code == 2
    assert "nearest that fit 2 ranks: dp2 ep2" in result.output
