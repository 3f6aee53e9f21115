"""What each rank's machine offers when a run starts: what would make it fail or crawl later is said beforehand."""

from __future__ import annotations

import platform
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from moescale.cluster.agreement import Agreement, ranks_text
from moescale.cluster.launch import Launch
from moescale.cluster.recovery import taken_by_copies

SKEW_SECONDS = 1.0  # between two clocks; ranks are compared to within about 0.1 s
SHOWN_DEVICES = 3
CONTROL_GROUPS = (  # of both versions: folder, limit, what is used, and which of that are files kept for speed
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class Needs:
    """What a run takes, at least.

    rank_bytes: of memory, on each rank, for weights, gradients and optimizer state. checkpoint_bytes: of disk, for one.
    checkpoints: how many lie on the disk at a time. memory_dir: where hosts keep copies in memory; None keeps none.
    """

    rank_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    memory_dir: str | None = None


@dataclass(frozen=True)
class Machine:
    """What one rank sees of its machine.

    clock: seconds, by time.time, taken by all ranks at about the same moment. copies_bytes: what copies in memory may
    take, those included that lie there already; None where it cannot be told.
    """

    device: str
    own_memory: bool  # of this rank alone, as a GPU's is
    free_bytes: int | None
    disk_free_bytes: int | None
    clock: float
    copies_bytes: int | None = None


@dataclass(frozen=True)
class Finding:
    """The outcome of one check, in one line."""

    check: str
    level: Literal["ok", "warn", "fail"]
    text: str


def look_around(ranks: Agreement, run_dir: Path, needs: Needs) -> list[Finding]:
    """Compare what all machines offer with what the run needs. All ranks call it, and get the same findings."""
    ranks.settle(None, len)  # which all ranks leave within a moment, so that their clocks can be compared
    machine = describe_machine(ranks.launch, run_dir, needs.memory_dir, time.time())
    said = ranks.settle(asdict(machine), lambda said: [
        asdict(finding) for finding in compare_machines([Machine(**each) for each in said], ranks.hosts, needs)])
    return [Finding(**finding) for finding in said]


def describe_machine(launch: Launch, run_dir: Path, memory_dir: str | None, clock: float) -> Machine:
    """Ask this machine what it has. run_dir: an existing directory. memory_dir: for copies, if any are kept"""
    disk: int | None = None
    copies: int | None = None
    with suppress(OSError):
        disk = shutil.disk_usage(run_dir).free
    if memory_dir is not None:
        with suppress(OSError):
            copies = shutil.disk_usage(Path(memory_dir).expanduser()).free + taken_by_copies(run_dir, memory_dir)
    if torch.cuda.is_available() and launch.device < torch.cuda.device_count():
        free, _ = torch.cuda.mem_get_info(launch.device)
        return Machine(torch.cuda.get_device_name(launch.device), True, free, disk, clock, copies)
    return Machine(_processor(), False, _free_memory(), disk, clock, copies)


def compare_machines(machines: Sequence[Machine], hosts: Sequence[str], needs: Needs) -> list[Finding]:
    """Judge what the ranks said, a finding for each check. hosts: of each rank"""
    return [_devices(machines, hosts), _memory(machines, hosts, needs), _disk(machines, hosts, needs),
            *([] if needs.memory_dir is None else [_copies(machines, hosts, needs)]),
            *([_clocks(machines, hosts)] if len(machines) > 1 else [])]


def _devices(machines: Sequence[Machine], hosts: Sequence[str]) -> Finding:
    kinds: dict[str, list[int]] = {}
    for rank, machine in enumerate(machines):
        kinds.setdefault(machine.device, []).append(rank)
    if len(kinds) == 1:
        (device,) = kinds
        return Finding("devices", "ok", f"{len(machines)} x {device}")
    shown = [f"{device} on {ranks_text(who)} ({hosts[who[0]]})" for device, who in kinds.items()][:SHOWN_DEVICES]
    return Finding("devices", "warn", f"ranks compute on different devices: {', '.join(shown)}: each step waits for "
                   "the slowest")


def _memory(machines: Sequence[Machine], hosts: Sequence[str], needs: Needs) -> Finding:
    """Hold the memory that is free to what weights, gradients and optimizer state take."""
    worst: tuple[float, str] | None = None
    for rank, machine in enumerate(machines):
        if machine.free_bytes is None:
            continue
        sharing = 1 if machine.own_memory else list(hosts).count(hosts[rank])
        needed = needs.rank_bytes * sharing
        where = f"rank {rank} ({hosts[rank]})" if sharing == 1 else f"{sharing} ranks on {hosts[rank]}"
        share = needed / max(1, machine.free_bytes)
        if worst is None or share > worst[0]:
            worst = share, f"{where}: {_size(machine.free_bytes)} are free"
            needed_text = _size(needed)
    if worst is None:
        return Finding("memory", "warn", "how much is free cannot be told on this system")
    share, where = worst
    text = f"{where}, weights, gradients and optimizer state take {needed_text}"
    if share <= 1:
        return Finding("memory", "ok", f"{text} before any activation")
    return Finding("memory", "warn", f"{text}: use more ranks for parallel.dp_shard, or a smaller model")


def _disk(machines: Sequence[Machine], hosts: Sequence[str], needs: Needs) -> Finding:
    known = [(machine.disk_free_bytes, rank) for rank, machine in enumerate(machines)
             if machine.disk_free_bytes is not None]
    if not known:
        return Finding("disk", "warn", "how much is free in run.dir cannot be told")
    free, rank = min(known)
    wanted = needs.checkpoint_bytes * needs.checkpoints
    text = (f"{_size(free)} are free in run.dir ({hosts[rank]}), a checkpoint takes {_size(needs.checkpoint_bytes)} "
            f"and up to {needs.checkpoints} lie there at a time")
    if free >= wanted:
        return Finding("disk", "ok", text)
    return Finding("disk", "warn", f"{text}: make room, or write a lower checkpoint.keep or another run.dir")


def _copies(machines: Sequence[Machine], hosts: Sequence[str], needs: Needs) -> Finding:
    """Hold the memory file system of each host to the copies of its own part and its neighbour's, old and new."""
    parts = 2 if len(set(hosts)) == 1 else 4
    worst: tuple[float, str] | None = None
    for host, machine in zip(hosts, machines, strict=True):
        if machine.copies_bytes is None:
            return Finding("copies", "warn", f"how much is free in checkpoint.memory_dir={needs.memory_dir} cannot be "
                           f"told on {host}")
        needed = parts * needs.checkpoint_bytes * hosts.count(host) / len(hosts)
        share = needed / max(1, machine.copies_bytes)
        if worst is None or share > worst[0]:
            worst = share, (f"{_size(machine.copies_bytes)} are free for copies in checkpoint.memory_dir="
                            f"{needs.memory_dir} ({host}), those of weights and moments take up to {_size(needed)}")
    assert worst is not None
    share, text = worst
    return Finding("copies", "ok", text) if share <= 1 else Finding(
        "copies", "warn", f"{text}: make that file system larger, or write another one in memory or "
        "checkpoint.in_memory=null")


def _clocks(machines: Sequence[Machine], hosts: Sequence[str]) -> Finding:
    middle = statistics.median(machine.clock for machine in machines)
    worst, rank = max((abs(machine.clock - middle), rank) for rank, machine in enumerate(machines))
    if worst < SKEW_SECONDS:
        return Finding("clocks", "ok", f"within {worst:.2f} s of each other")
    way = "ahead of" if machines[rank].clock > middle else "behind"
    return Finding("clocks", "warn", f"the clock of rank {rank} ({hosts[rank]}) is {worst:,.1f} s {way} the others': "
                   "times in logs do not agree; set it, e.g. by NTP")


def _processor() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found is not None:
            return found[1]
    return platform.processor() or platform.machine()


def _free_memory() -> int | None:
    """Read how many bytes this process may still take: what is available, and what its control group leaves."""
    found: list[int] = []
    with suppress(OSError):
        available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        found += [int(available[1]) * 1024] if available is not None else []
    for folder, limit, used, cache in CONTROL_GROUPS:
        with suppress(OSError, ValueError, IndexError):  # "max" is no number
            idle = re.findall(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)[0]
            taken = int((folder / used).read_text()) - int(idle)  # files that nobody needs give way
            found.append(int((folder / limit).read_text()) - taken)
    return max(0, min(found)) if found else None


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
