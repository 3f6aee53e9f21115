"""What the launcher says in the environment: who started this process, and together with how many others."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from moescale.config import ConfigError

# What launchers set for each of several tasks; a rank count of ours must then come from somewhere.
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
FIRST_PORT, PORTS = 15000, 15000  # below those that systems hand out, one for each step that srun starts
ALONE = "unset it to train on one process, or start with torchrun"


@dataclass(frozen=True)
class Launch:
    """One rank among those that were started together.

    node_ranks: how many of them are on this node. address, port: where rank 0 is found. run_id: the launcher's name of
    the job. bound: whether the launcher shows each rank its own device alone. keeps_store: whether the launcher itself
    keeps the store at that address, beyond a restart of its ranks. node: the number of this node, where the launcher
    says it. restarts: how often the launcher has restarted the ranks. elastic: whether torchrun is the launcher.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    node_ranks: int = 1
    address: str = ""
    port: int = 0
    run_id: str = ""
    bound: bool = False
    keeps_store: bool = False
    restarts: int = 0
    node: int = 0
    elastic: bool = False
    host: str = field(default_factory=socket.gethostname)

    @property
    def device(self) -> int:
        """The number of this rank's device among those that it sees."""
        return 0 if self.bound else self.local_rank


def read_launch() -> Launch:
    """Read the environment. Raises ConfigError, one line, for one that is odd or half set."""
    given = os.environ
    if "WORLD_SIZE" not in given:
        return _of_srun(given) if _started_by_srun(given) else _alone(given)
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


def read_secret() -> str:
    """Read the secret that the nodes of a job share; empty where there is none."""
    return os.environ.get("MOESCALE_SECRET", "")


def leave_signals_to_agent() -> None:
    """Keep torch, which would take them with each start of ranks, from the signals that our agent takes itself."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"


def is_one_of_many() -> bool:
    """Whether other ranks were started together with this process; an odd environment counts as one."""
    given = os.environ
    return given.get("WORLD_SIZE", "1") != "1" or ("WORLD_SIZE" not in given and _started_by_srun(given))


def _started_by_srun(given: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of a step, and not a batch script, which has no step."""
    return given.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "0", "1") and "SLURM_PROCID" in given


def _of_srun(given: Mapping[str, str]) -> Launch:
    """Read what srun sets, where it starts a task for each rank. Rank 0 is the first task of the step's first node."""
    size = _number(given, "SLURM_STEP_NUM_TASKS", 1, None)
    job, step = (_number(given, name, 0, None, default=0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    local_rank = _number(given, "SLURM_LOCALID", 0, size - 1)
    nodes, node = given.get("SLURM_STEP_NODELIST", ""), _number(given, "SLURM_NODEID", 0, None, default=0)
    address = given.get("MASTER_ADDR", "").strip() or _first_host(nodes)
    if not address:
        raise ConfigError("SLURM_STEP_NODELIST is not set, so that rank 0 cannot be found: write its host in "
                          "MASTER_ADDR")
    counts = _tasks_of_nodes(given.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return Launch(
        rank=_number(given, "SLURM_PROCID", 0, size - 1), size=size, local_rank=local_rank,
        node_ranks=counts[node] if node < len(counts) else local_rank + 1, address=address,
        port=_number(given, "MASTER_PORT", 1, 65535, default=FIRST_PORT + (16 * job + step) % PORTS),
        run_id=f"{job}.{step}", node=node, bound=len(given.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1
        and given.get("CUDA_VISIBLE_DEVICES", "") != "",
    )


def _first_host(nodes: str) -> str:
    """Read the first name of a list as Slurm writes it: node[03-05,9],gpu1 begins with node03."""
    first, _, _ = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes).partition(",")  # of each list its first
    return first


def _tasks_of_nodes(text: str) -> list[int]:
    """Read how many tasks each node has: 8(x3),4 is three nodes of 8 and one of 4."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


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
        size = next((key for key in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS") if key in given and key != name), None)
        where = "" if size is None else f" where {size}={given[size]}"
        raise ConfigError(f"{name}={number} must be {wanted}{where}: {ALONE}")
    return number
