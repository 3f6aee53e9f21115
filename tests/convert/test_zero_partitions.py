"""What DeepSpeed saves of the engine's own layers goes on under the native engine, experts and moments included."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moescale.checkpoint.store import latest_checkpoint
from moescale.config import ConfigError
from moescale.convert.formats.deepspeed import open_checkpoint
from moescale.convert.mapping.mapped import FileLayout, weights_of
from moescale.convert.run import convert, open_source
from moescale.engine.base import build_engine
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from tests.support.engines import Course, difference, make_config, take_steps, whole

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def save_and_go_on(
    folder: Path, stage: int, parallel: dict[str, int], compute: str
) -> tuple[dict[str, Tensor], Course]:
    """Take two steps under DeepSpeed, let it save, and take two more. -> the weights it saved, and these steps"""
    config = make_config("bias", parallel, compute, engine="deepspeed", zero_stage=stage)
    mesh = start_mesh(config)
    engine: Any = build_engine(config, mesh)
    take_steps(engine, config, mesh, range(2))
    engine.ds.save_checkpoint(str(folder))
    if dist.get_rank() == 0:
        (folder / "config.yaml").write_text(config.to_yaml())
    saved = whole(engine.parameters())
    course = take_steps(engine, config, mesh, range(2, 4))
    stop_mesh()
    return saved, course


def go_on(run: Path, parallel: dict[str, int]) -> Course:
    """Take two steps more under the native engine."""
    config = make_config("bias", parallel)
    mesh = start_mesh(config)
    engine = build_engine(config, mesh)
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    engine.load(checkpoint)
    course = take_steps(engine, config, mesh, range(2, 4))
    stop_mesh()
    return course


@pytest.mark.parametrize(("stage", "ranks", "parallel", "compute"), [
    (3, 2, {"ep": 2}, "float32"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (0, 2, {"ep": 1}, "float32"), (1, 2, {"ep": 1}, "float32"), (1, 4, {"ep": 2}, "float32"),
        (1, 4, {"ep": 2}, "bfloat16"), (2, 2, {"ep": 2}, "bfloat16"), (2, 4, {"ep": 2}, "float32"),
        (2, 4, {"ep": 2, "etp": 2}, "float32"), (3, 2, {"ep": 1}, "float32"), (3, 4, {"ep": 2}, "float32"),
        (3, 4, {"ep": 2, "etp": 2}, "float32"), (3, 4, {"ep": 4}, "bfloat16")))], ids=str)
def test_a_checkpoint_of_deepspeeds_own_goes_on_here(
    tmp_path: Path, stage: int, ranks: int, parallel: dict[str, int], compute: str
) -> None:
    folder = tmp_path / "zero"
    folder.mkdir()
    saved, theirs = run_ranks(ranks, save_and_go_on, folder, stage, parallel, compute)[0]
    for native, tensor in weights_of(open_checkpoint(folder)):
        weight = saved.get(".".join(native.weight))  # of biases, which do not learn, the next steps tell
        if weight is not None:
            assert torch.equal(tensor, weight if native.expert is None else weight[native.expert]), native
    result = convert(open_source(folder), tmp_path / "run", "moescale", FileLayout())
    assert not result.left_out
    if stage > 0 and compute == "float32":
        ours = run_ranks(ranks, go_on, tmp_path / "run", {"ep": 2})[0]
        for name, found in difference(ours, theirs).items():
            assert found < 1e-5, f"{name} differ by {found:.1e}"
    refuses_what_it_cannot_gather(folder)


def refuses_what_it_cannot_gather(folder: Path) -> None:
    """Say in one line that a rank's file is missing, that one of another checkpoint is there, or ranks are mixed."""
    files = sorted(folder.glob("*/*optim_states.pt"))
    if not files:
        return
    model = min(folder.glob("*/*model_states.pt"))
    content = model.read_bytes()
    values = torch.load(model)
    torch.save({**values, "ds_config": {"use_data_before_expert_parallelism": True}}, model)
    with pytest.raises(ConfigError, match="use_data_before_expert_parallelism"):
        open_source(folder)
    model.write_bytes(content)
    more = files[-1].with_name(files[-1].name.replace(f"rank_{len(files) - 1}_", f"rank_{len(files)}_"))
    shutil.copy(files[-1], more)
    with pytest.raises(ConfigError, match=f"of {len(files) + 1} ranks, and {len(files)} saved"):
        open_source(folder)
    more.unlink()
    files[-1].unlink()
    with pytest.raises(ConfigError, match=f"of {len(files) - 1} ranks, and {len(files)} saved"):
        open_source(folder)
