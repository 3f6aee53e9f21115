"""Other experts: what keeps the logits keeps them, and experts that are placed by load train on as they would have."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import moescale
from moescale.cli import app
from moescale.config import ConfigError
from moescale.convert.edits.experts import permute, reduce, replicate, upcycle
from moescale.convert.edits.loads import read_loads
from moescale.convert.edits.rank_balance import balance, balance_ranks
from moescale.convert.mapping.mapped import FileLayout, weights_of
from moescale.convert.run import convert, open_source
from tests.support.joined import run_joined
from tests.support.models import DENSE, make_config, write_run

TOKENS = torch.arange(60).view(2, 30) * 11 % 264


def logits(run: Path) -> torch.Tensor:
    return moescale.load(run).logits(TOKENS)


@pytest.mark.parametrize(("experts", "top_k", "parts"), [(8, None, 1), (12, None, 2), (16, 4, 4), (3, 3, 1)])
def test_upcycled_logits_are_the_dense_ones(tmp_path: Path, experts: int, top_k: int | None, parts: int) -> None:
    run = write_run(tmp_path / "run", make_config(DENSE))
    opened = open_source(run)
    result = convert(opened, tmp_path / "there", "moescale", FileLayout(),
                     change=upcycle(opened, experts, top_k, parts, 0.0))
    model = moescale.load(tmp_path / "there")
    torch.testing.assert_close(model.logits(TOKENS), logits(run), rtol=0, atol=1e-5)
    layer = model.blocks["0"].channel_mixer
    assert layer.experts.up.shape == (experts, 32 // parts, 16)
    assert layer.router.top_k == (top_k or 2 * parts)
    assert len({digest for name, digest in result.fingerprints.items() if "expert" in name}) >= experts
    convert(opened, tmp_path / "noisy", "moescale", FileLayout(), change=upcycle(opened, experts, top_k, parts, 0.5))
    assert (logits(tmp_path / "noisy") - logits(run)).abs().max() > 1e-3


@pytest.mark.parametrize("moe", [
    {}, {"router": "switch", "top_k": 1, "capacity_factor": 2.0}, {"router": "sigmoid_bias", "num_shared_experts": 1},
    {"router": "expert_choice", "capacity_factor": 2.0},
], ids=lambda moe: moe.get("router", "mixtral"))
def test_copies_of_experts_keep_the_logits(tmp_path: Path, moe: dict[str, Any]) -> None:
    run = write_run(tmp_path / "run", make_config(moe=moe))
    opened = open_source(run)
    convert(opened, tmp_path / "there", "moescale", FileLayout(), change=replicate(opened, 24, 0.0))
    model = moescale.load(tmp_path / "there")
    assert model.blocks["0"].channel_mixer.experts.up.shape[0] == 24
    torch.testing.assert_close(model.logits(TOKENS), logits(run), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="multiple of the 12"):
        replicate(opened, 18, 0.0)


def write_loads(run: Path, loads: dict[int, list[int]]) -> None:
    keys = {f"moe/layer_{layer:02d}/tokens_per_expert": counts for layer, counts in loads.items()}
    (run / "metrics.jsonl").write_text((json.dumps({"step": 1, **keys}) + "\n") * 2 + '{"cut')


def test_the_idlest_experts_go(tmp_path: Path) -> None:
    """Those that no token chose can go without a trace; merged ones become means weighed by load."""
    run = write_run(tmp_path / "run", make_config())
    loads = {0: [5, 1, 9, 9, 9, 9, 9, 9, 9, 9, 9, 3], 1: [9] * 11 + [0]}
    write_loads(run, loads)
    opened = open_source(run)
    found = read_loads(run, opened.config)
    assert found == {layer: [2 * count for count in counts] for layer, counts in loads.items()}
    convert(opened, tmp_path / "fewer", "moescale", FileLayout(), change=reduce(opened, found, 2, merge=False))
    old, new = (moescale.load(path).blocks["0"].channel_mixer for path in (run, tmp_path / "fewer"))
    kept = [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert torch.equal(new.experts.down, old.experts.down[kept])
    assert torch.equal(new.router.weight, old.router.weight[kept])
    convert(opened, tmp_path / "merged", "moescale", FileLayout(), change=reduce(opened, found, 1, merge=True))
    new = moescale.load(tmp_path / "merged").blocks["0"].channel_mixer
    rows = torch.nn.functional.normalize(old.router.weight.detach(), dim=-1)
    others = [0, *range(2, 12)]
    like = others[int((rows[others] @ rows[1]).argmax())]
    share = loads[0][like] / (loads[0][like] + 1)
    expected = share * old.experts.up[like] + (1 - share) * old.experts.up[1]
    torch.testing.assert_close(new.experts.up[others.index(like)], expected)
    with pytest.raises(ConfigError, match=r"fewer than moe\.top_k=2"):
        reduce(opened, found, 11, merge=True)


def test_balance_is_near_the_best(tmp_path: Path) -> None:
    """Beside every sharing of small ones, by brute force; and never worse than what was given."""
    draw = random.Random(0)
    for _ in range(60):
        loads = [draw.randrange(100) for _ in range(8)]
        best = min(max(sum(loads[item] for item in half), sum(loads) - sum(loads[item] for item in half))
                   for half in itertools.combinations(range(8), 4))
        blocks = balance(loads, 2)
        assert sorted(item for block in blocks for item in block) == list(range(8))
        assert {len(block) for block in blocks} == {4}
        heaviest = max(sum(loads[item] for item in block) for block in blocks)
        assert best <= heaviest <= min(1.1 * best + 1, max(sum(loads[:4]), sum(loads[4:])))


@pytest.mark.parametrize(("groups", "ep"), [(4, 2), (2, 4), (1, 6), (3, 3)])
def test_groups_stay_groups(groups: int, ep: int) -> None:
    config = make_config(moe={"router": "sigmoid_bias", "num_expert_groups": groups, "top_k_groups": 1})
    placed = balance_ranks({0: [7, 1, 4, 9, 12, 3, 3, 20, 1, 5, 6, 2]}, config, ep)
    size = 12 // groups
    order = placed.orders[0]
    assert sorted(order) == list(range(12))
    for first in range(0, 12, size):
        assert len({old // size for old in order[first : first + size]}) == 1
    assert max(placed.after[0]) <= max(placed.before[0])
    assert sum(placed.after[0]) == sum(placed.before[0]) == 73
    with pytest.raises(ConfigError, match="must divide"):
        balance_ranks({0: [1] * 12}, config, 5)


def test_placed_experts_compute_the_same(tmp_path: Path) -> None:
    config = make_config(moe={"router": "sigmoid_bias", "num_expert_groups": 2, "top_k_groups": 1})
    run = write_run(tmp_path / "run", config, optimizer=True)
    write_loads(run, {0: [90, 80, 70, 1, 2, 3, 4, 5, 6, 7, 8, 9], 1: list(range(12))})
    result = CliRunner().invoke(app, ["edit", str(run), str(tmp_path / "there"), "--verify", "--place-experts", "4"])
    assert result.exit_code == 0, result.output
    assert "busiest rank before" in result.output
    assert torch.allclose(logits(tmp_path / "there"), logits(run), rtol=0, atol=1e-5)
    placed = json.loads((tmp_path / "there/placement.json").read_text())["layers"]["0"]
    assert max(placed["rank_load_after"]) < max(placed["rank_load_before"])
    assert open_source(run).tensors.keys() == open_source(tmp_path / "there").tensors.keys()


def test_a_run_goes_on_from_placed_experts_and_without_optimizer_state(tmp_path: Path) -> None:
    unbroken = run_joined((1, {}), tmp_path / "run", False, None)
    run_joined((1, {}), tmp_path / "run", False, 10)
    opened = open_source(tmp_path / "run")
    convert(opened, tmp_path / "placed", "moescale", FileLayout(), change=permute(opened, {1: [*range(1, 12), 0]}, {}))
    placed = run_joined((2, {"ep": 2}), tmp_path / "placed", True, None)
    assert placed["losses"] == pytest.approx(unbroken["losses"][10:], rel=1e-5)
    convert(opened, tmp_path / "megatron", "megatron", FileLayout())
    convert(open_source(tmp_path / "megatron"), tmp_path / "bare", "moescale", FileLayout())
    bare = run_joined((1, {}), tmp_path / "bare", True, 3)
    assert bare["losses"][0] == pytest.approx(unbroken["losses"][0], rel=1), "training starts"
    assert len(bare["losses"]) == 3


def test_permutation_takes_the_optimizer_along(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_config(), optimizer=True)
    opened = open_source(run)
    order = [3, 10, 2, 0, 11, 4, 9, 1, 5, 8, 7, 6]
    convert(opened, tmp_path / "there", "moescale", FileLayout(), change=permute(opened, {0: order, 1: order}, {}))
    before, after = ({str(name): tensor for name, tensor in weights_of(open_source(path), moments=True)}
                     for path in (run, tmp_path / "there"))
    for plane, (new, old) in itertools.product(("", "optim.exp_avg.", "optim.exp_avg_sq."), enumerate(order)):
        name = f"{plane}blocks.1.channel_mixer."
        for part in ("gate", "up", "down"):
            assert torch.equal(after[f"{name}experts.{part}.{new}"], before[f"{name}experts.{part}.{old}"])
        assert torch.equal(after[f"{name}router.weight"][new], before[f"{name}router.weight"][old])
    assert torch.equal(after["optim.exp_avg.norm.weight"], before["optim.exp_avg.norm.weight"])


def test_moments_in_bfloat16_stay_so(tmp_path: Path) -> None:
    saved = run_joined((1, {}), tmp_path / "run", False, 2, {"moments": "bfloat16"})["state"]
    opened, order = open_source(tmp_path / "run"), [*range(1, 12), 0]
    convert(opened, tmp_path / "there", "moescale", FileLayout(), change=permute(opened, {1: order}, {}))
    after = open_source(tmp_path / "there").tensors
    assert all(after[name].dtype == tensor.dtype for name, tensor in saved.items())
    assert {saved[name].dtype for name in saved if name.startswith("optim.")} == {torch.bfloat16}
    there = dict(weights_of(open_source(tmp_path / "there"), moments=True))
    for name, tensor in there.items():
        kept = saved[f"optim.{name.moment}.{'.'.join(name.weight)}"] if name.moment else None
        if kept is not None and name.expert is not None:
            assert torch.equal(tensor, kept[order[name.expert]]), str(name)


def test_the_command(tmp_path: Path) -> None:
    """It keeps the source's format, or takes --to; what it does not take together is one line; convert points to it."""
    run = write_run(tmp_path / "run", make_config({**DENSE, "window": None}))
    plain = CliRunner()

    def call(*words: object, status: int = 0) -> str:
        result = plain.invoke(app, [*map(str, words)])
        assert result.exit_code == status, result.output
        assert status == 0 or len(result.output.splitlines()) == 1
        return result.output

    output = call("edit", run, tmp_path / "hf", "--upcycle", 4, "--granularity", 2, "--to", "hf", "--verify")
    assert "largest difference of the logits" in output
    call("edit", tmp_path / "hf", tmp_path / "more", "--experts", 8, "--noise", 0.1, "--verify")
    opened = open_source(tmp_path / "more")
    assert (opened.format, opened.config.moe.num_experts, opened.config.moe.d_ff) == ("hf", 8, 16)
    there = tmp_path / "there"
    assert "one change of the experts: --upcycle or --experts" in call(
        "edit", run, there, "--upcycle", 4, "--experts", 8, status=2)
    assert "--place-experts" in call("edit", run, there, "--noise", 0.1, status=2)
    assert "--noise is for" in call("edit", run, there, "--drop-experts", 2, "--noise", 0.1, status=2)
    assert "--top-k are for --upcycle" in call("edit", run, there, "--experts", 8, "--top-k", 4, status=2)
    assert "--load is for" in call("edit", run, there, "--experts", 8, "--load", run, status=2)
    assert "--to pickles is no format" in call("edit", run, there, "--experts", 8, "--to", "pickles", status=2)
    assert "moescale edit" in call("convert", run, there, "--to", "hf", "--drop-experts", 2, status=2)
    assert not there.exists()
