"""Save and resume equals never having stopped, in the same layout bit for bit, in another to 1e-5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moescale.generate import load_model
from moescale.parallel.ranks import run_ranks
from tests.support.joined import STEPS, run_joined, run_steps, write_text

LAYOUTS = [
    (1, {}), (2, {"ep": 2}), (4, {"tp": 2, "pp": 2}), (4, {"ep": 2, "dp_replicate": 2}),
    (4, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}), (2, {"ep": 1}), (2, {"pp": 2}),
]


OPTIMIZERS = ({"lr": 3e-3}, {"lr": 3e-2, "name": "adafactor", "momentum": 0.9}, {"lr": 3e-2, "name": "adafactor"},
              {"lr": 3e-3, "moments": "bfloat16"})


@pytest.mark.parametrize(("before", "after", "optim"), list(zip(
    LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], 3 * OPTIMIZERS, strict=False)), ids=str)
def test_resume_in_another_layout(tmp_path: Path, before: tuple, after: tuple, optim: dict) -> None:
    unbroken = run_joined(before, tmp_path, False, None, optim)
    saved = run_joined(before, tmp_path, False, STEPS // 2, optim)
    again = run_joined(before, tmp_path, True, None, optim)
    assert saved["losses"] + again["losses"] == unbroken["losses"], "the same layout goes on bit for bit"
    for name, tensor in unbroken["state"].items():
        assert torch.equal(again["state"][name], tensor), name
    other = run_joined(after, tmp_path, True, None, optim)
    assert other["losses"] == pytest.approx(unbroken["losses"][STEPS // 2 :], rel=1e-5)
    assert other["loaded"].keys() == saved["state"].keys()
    for name, tensor in saved["state"].items():
        assert torch.equal(other["loaded"][name], tensor), f"{name} came back different in another layout"


@pytest.mark.parametrize(("before", "now"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_moments_are_read_in_the_dtype_of_the_run_that_goes_on(tmp_path: Path, before: str, now: str) -> None:
    saved = run_joined((1, {}), tmp_path, False, 2, {"moments": before})
    loaded = run_joined((2, {"ep": 2}), tmp_path, True, 3, {"moments": now})["loaded"]
    for name, tensor in saved["state"].items():
        dtype = getattr(torch, now) if name.startswith("optim.") else tensor.dtype
        assert loaded[name].dtype == dtype, name
        assert torch.equal(loaded[name], tensor.to(dtype)), name


def test_load_gives_the_model_on_one_process(tmp_path: Path) -> None:
    write_text(tmp_path)
    saved = run_ranks(4, run_steps, tmp_path, {"ep": 4}, False, 2)[0]
    model, _, _ = load_model(tmp_path)
    tensors = model.state_dict()
    assert tensors["blocks.1.channel_mixer.router.expert_bias"].any(), "no buffer is left at its zeros"
    for name, tensor in tensors.items():
        assert torch.equal(tensor, saved["state"][f"model.{name}"])
    logits = model.logits(torch.zeros(2, 5, dtype=torch.int64))
    assert logits.shape == (2, 5, 264)
    assert logits.dtype == torch.float32
