"""Environments as launchers set them."""

from __future__ import annotations

import pytest

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT",
         "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID",
         "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "TORCHELASTIC_RUN_ID",
         "CUDA_VISIBLE_DEVICES")
SRUN = {"SLURM_NTASKS": "12", "SLURM_STEP_NUM_TASKS": "12", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "node[03-05]",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1"}


def set_environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Set what a launcher sets, and nothing else."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
