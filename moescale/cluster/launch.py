"""What the launcher says in the environment: who started this process, and together with how many others."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from moescale.config import ConfigError

# What launchers set for each of several tasks; a rank count of ours must then come from somewhere.
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
ALONE = "unset it to train on one process, or start with torchrun"


@dataclass(frozen=True)
class Launch:
    """One rank among those that were started together.

    node_ranks: how many of them are on this node. address, port: where rank 0 is found. run_id: the launcher's name of
    the job. keeps_store: whether the launcher itself keeps the store at that address, beyond a restart of its ranks.
    node: the number of this node, where torchrun says it.
    restarts: how often the launcher has restarted the ranks. elastic: whether torchrun is the launcher.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    node_ranks: int = 1
    address: str = ""
    port: int = 0
    run_id: str = ""
    keeps_store: bool = False
    restarts: int = 0
    node: int = 0
    elastic: bool = False
    host: str = field(default_factory=socket.gethostname)


def read_launch() -> Launch:
    """Read the environment. Raises ConfigError, one line, for one that is odd or half set."""
    given = os.environ
    if "WORLD_SIZE" not in given:
        return _alone(given)
    size = _number(given, "WORLD_SIZE", 1, None)
    if size > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in given]
        if missing:
            raise ConfigError(f"WORLD_SIZE={size} is set, but {' and '.join(missing)} not: start with torchrun, or "
                              "unset WORLD_SIZE to train on one process")
        if not given["MASTER_ADDR"].strip():
            raise ConfigError("MASTER_ADDR is empty: write the host of rank 0")
    # DeepSpeed's launcher says LOCAL_SIZE and CROSS_RANK where torchrun says LOCAL_WORLD_SIZE and GROUP_RANK
    node_ranks = _number(given, "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in given else "LOCAL_SIZE", 1, size, size)
    elastic = "TORCHELASTIC_RUN_ID" in given
    return Launch(
        rank=_number(given, "RANK", 0, size - 1, default=0), size=size,
        local_rank=_number(given, "LOCAL_RANK", 0, node_ranks - 1, default=0), node_ranks=node_ranks,
        address=given.get("MASTER_ADDR", "").strip(),
        port=_number(given, "MASTER_PORT", 1, 65535, default=0) if size > 1 or elastic else 0,
        run_id=given.get("TORCHELASTIC_RUN_ID", ""),
        keeps_store=given.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True",
        restarts=_number(given, "TORCHELASTIC_RESTART_COUNT", 0, None, default=0),
        node=_number(given, "GROUP_RANK" if "GROUP_RANK" in given else "CROSS_RANK", 0, None, default=0),
        elastic=elastic,
    )


def _alone(given: Mapping[str, str]) -> Launch:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if name in given:
            raise ConfigError(f"{name}={given[name]} is set, but WORLD_SIZE is not: {ALONE}")
    for name in TASK_COUNTS:
        if given.get(name, "1") not in ("", "0", "1"):
            raise ConfigError(f"{name}={given[name]} tasks were started, but WORLD_SIZE is not set, so that each would "
                              "be a run of its own: start one torchrun a node, as launch/slurm.sbatch does, or set "
                              "WORLD_SIZE=1 to train on one process")
    return Launch()


def _number(given: Mapping[str, str], name: str, low: int, high: int | None, default: int | None = None) -> int:
    text = given.get(name)
    if text is None and default is not None:
        return default
    wanted = f"a whole number from {low}" + ("" if high is None else f" to {high}")
    try:
        number = int(text or "")
    except ValueError:
        raise ConfigError(f"{name}={text!r} must be {wanted}: {ALONE}") from None
    if number < low or (high is not None and number > high):
        raise ConfigError(f"{name}={number} must be {wanted}" + (
            f" where WORLD_SIZE={given['WORLD_SIZE']}" if name != "WORLD_SIZE" else "") + f": {ALONE}")
    return number
