"""What the environment says of a launch: read whole, or refused in one line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from moescale.cli import app
from moescale.cluster.launch import read_launch
from moescale.config import ConfigError
from tests.support.environments import SRUN, set_environment

WHOLE = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1",
         "MASTER_PORT": "29500"}


def read(monkeypatch: pytest.MonkeyPatch, **values: str):
    set_environment(monkeypatch, **values)
    return read_launch()


def test_whole_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = read(monkeypatch, **WHOLE)
    assert (launch.rank, launch.size, launch.local_rank, launch.node_ranks) == (3, 4, 1, 2)
    assert (launch.address, launch.port) == ("10.0.0.1", 29500)
    deepspeed = {"LOCAL_SIZE" if name == "LOCAL_WORLD_SIZE" else name: value for name, value in WHOLE.items()}
    by_deepspeed = read(monkeypatch, **deepspeed, CROSS_RANK="1", CROSS_SIZE="2")
    assert (by_deepspeed.rank, by_deepspeed.local_rank, by_deepspeed.node_ranks, by_deepspeed.node) == (3, 1, 2, 1)
    monkeypatch.delenv("CROSS_RANK")
    for alone in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"MASTER_ADDR": "somewhere"},
                  {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "2", "WORLD_SIZE": "1"}):
        assert read(monkeypatch, **alone).size == 1


@pytest.mark.parametrize(("values", "named"), [
    ({"RANK": "1"}, "WORLD_SIZE"), ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0"), ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ({"WORLD_SIZE": "-3"}, "WORLD_SIZE=-3"), ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE='1.5'"),
    ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT"), ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1"),
    ({**WHOLE, "RANK": "4"}, "RANK=4"), ({**WHOLE, "RANK": ""}, "RANK=''"), ({**WHOLE, "RANK": "-1"}, "RANK=-1"),
    ({**WHOLE, "LOCAL_RANK": "2"}, "LOCAL_RANK=2"), ({**WHOLE, "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8"),
    ({**WHOLE, "MASTER_ADDR": " "}, "MASTER_ADDR"), ({**WHOLE, "MASTER_PORT": "0"}, "MASTER_PORT=0"),
    ({**WHOLE, "MASTER_PORT": "65536"}, "MASTER_PORT=65536"), ({**WHOLE, "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURM_NTASKS=2"), ({**SRUN, "SLURM_PROCID": "12"}, "SLURM_PROCID=12"),
    ({**SRUN, "SLURM_STEP_NODELIST": ""}, "MASTER_ADDR"), ({**SRUN, "SLURM_LOCALID": "one"}, "SLURM_LOCALID='one'"),
])
def test_odd_and_half_set_environments_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(monkeypatch, **values)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rank_that_was_left_in_the_environment_silences_no_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for words in (["report", "nothing"], ["convert", "--inspect", "nothing"], ["generate", "nothing"]):
        result = CliRunner().invoke(app, [*words[:-1], str(tmp_path / words[-1])])
        assert result.exit_code == 2
        assert len([line for line in result.output.splitlines() if line.startswith("moescale: ")]) == 1
