"""Time from each kind of fault to the next finished step, on hosts of this machine.

    python tools/faults.py [--shapes 1x4 2x2] [--kinds rank_killed ...] [--repeats 10] [--warm]
    python tools/faults.py --summary

A small model trains under launch/torchrun.sh while faults are planted one by one. An agent that
ends, with whatever status, is started again at once, as a cluster's scheduler would do it. Each
fault becomes a line of tools/benchmark/results/faults.jsonl: the seconds to the next step that was
finished after it, and how many steps were lost, which is those that are computed a second time.
With --warm each rank leaves a spare process behind, and the next fault waits until all are ready.

Needs root and network namespaces for several hosts; one host works everywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster import ROOT, Cluster
from rich.console import Console
from rich.table import Table
from small_run import SMALL_RUN

RESULTS = ROOT / "tools/benchmark/results/faults.jsonl"
TIMEOUT_SECONDS = 10  # run.timeout_seconds: what the user allows for a rank that does not come
SHORT_CUT, LONG_CUT = 3.0, 15.0  # seconds: within that time-out and beyond it
START_SECONDS = 110.0
RECOVER_SECONDS = 110.0
RESTARTS = 1000
SECOND_PORT = 29501  # of another job on the first host
LAST_STEPS = 10  # more than ranks finish behind a cut link; those that were just starting go on all the same
REFUSED = 2  # the status of a job that cannot work as it was asked for
DISK = "256m"
TAIL_BYTES = 1 << 18
SAVED = ["parallel.ep=2", "checkpoint.every=10", f"run.timeout_seconds={TIMEOUT_SECONDS}"]


class Job:
    """One run on all hosts of a cluster, whose agents are started again when they end."""

    def __init__(
        self,
        cluster: Cluster,
        ranks: int,
        run_dir: Path,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.cluster, self.ranks, self.run_dir = cluster, ranks, run_dir
        self.environment = environment
        cache = f"data.cache_dir={cluster.folder}/cache"
        self.words = ["train", *SMALL_RUN, *SAVED, cache, f"run.dir={run_dir}", *words]
        self.agents: dict[int, subprocess.Popen[Any]] = {}
        self.kept: set[int] = set()  # hosts whose agents are not started again for now
        self.statuses: list[int] = []

    def tend(self) -> bool:
        """Start what is not running; an agent that ended well is left alone. -> whether all have"""
        over = 0
        for host in range(self.cluster.size):
            agent = self.agents.get(host)
            status = None if agent is None else agent.poll()
            if agent is not None and status is None:
                continue
            over += status == 0
            if status == 0 or host in self.kept:
                continue
            if status is not None:
                self.statuses.append(status)
            with self.said(host).open("a") as output:
                self.agents[host] = self.cluster.launch(
                    host,
                    self.words,
                    ranks=self.ranks,
                    restarts=RESTARTS,
                    environment=self.environment,
                    output=output,
                )
        return over == self.cluster.size

    def said(self, host: int) -> Path:
        """Name the file of what a host's agent and ranks have printed."""
        return self.cluster.folder / f"host{host}.log"

    def steps(self) -> list[dict[str, Any]]:
        """Read the figures of the last finished steps."""
        found = []
        with suppress(OSError), (self.run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            for line in file.read().splitlines():
                with suppress(
                    json.JSONDecodeError
                ):  # of the first or the last only a part is there
                    found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def last_step(self) -> int:
        """Count the steps done; they become fewer when a run goes on from a checkpoint."""
        return int((self.steps() or [{"step": 0}])[-1]["step"])

    def wait_for(
        self, good: Callable[[dict[str, Any]], bool], seconds: float
    ) -> dict[str, Any] | None:
        """Tend the job until a step is good. -> the first such one; None where it takes longer"""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.tend()
            found = next((step for step in self.steps() if good(step)), None)
            if found is not None:
                return found
            time.sleep(0.05)
        return None

    def wait(self, seconds: float) -> None:
        """Tend the job for so long."""
        self.wait_for(lambda step: False, seconds)

    def wait_for_steps(self, count: int) -> bool:
        """Tend the job until that many steps more are done. -> whether they were, in time"""
        wanted = self.last_step() + count
        return self.wait_for(lambda step: step["step"] >= wanted, START_SECONDS) is not None

    def wait_for_spares(self) -> bool:
        """Tend the job until each rank has a spare that waits. -> whether all have, in time"""
        hosts = range(self.cluster.size)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.wait(0.5)
            alive = {pid for host in hosts for pid in self.cluster.processes(host)}
            sockets = Path(tempfile.gettempdir()).glob("moescale-spares-*/*")
            ready = [path for path in sockets if int(path.name.split("-")[0]) in alive]
            if len(ready) == self.cluster.size * self.ranks:
                return True
        return False

    def draw_rank(self, draw: random.Random) -> int:
        """Draw one of the ranks that live. -> its process id"""
        hosts = list(range(self.cluster.size))
        return draw.choice([pid for host in hosts for pid in self.cluster.ranks(host).values()])


def kill_rank(job: Job, draw: random.Random) -> None:
    signal_rank(job, draw, signal.SIGKILL)


def stop_rank(job: Job, draw: random.Random) -> None:
    signal_rank(job, draw, signal.SIGSTOP)


def signal_rank(job: Job, draw: random.Random, number: signal.Signals) -> None:
    os.kill(job.draw_rank(draw), number)


def lose_host(job: Job, draw: random.Random) -> None:
    """Kill the agent and the ranks of the last host."""
    job.cluster.kill(job.cluster.size - 1)


def lose_head(job: Job, draw: random.Random) -> None:
    """Kill the agent and the ranks of the host where the others find each other."""
    job.cluster.kill(0)


def ask_agents(number: signal.Signals) -> Callable[[Job, random.Random], None]:
    """Make a fault that asks all agents to end, as a scheduler does that needs the hosts."""

    def ask(job: Job, draw: random.Random) -> None:
        for agent in job.agents.values():
            agent.send_signal(number)

    return ask


def cut_for(seconds: float) -> Callable[[Job, random.Random], None]:
    """Make a fault that cuts the last host's link for so long."""

    def cut(job: Job, draw: random.Random) -> None:
        job.cluster.cut(job.cluster.size - 1)
        job.wait(seconds)
        job.cluster.mend(job.cluster.size - 1)

    return cut


def damage_newest(job: Job, draw: random.Random) -> None:
    """Turn a byte of the newest checkpoint, then kill a rank."""
    newest = max((job.run_dir / "checkpoints").glob("step_*[0-9]/*.distcp"))
    with newest.open("r+b") as file:
        file.seek(newest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 255]))
    kill_rank(job, draw)


def fill_disk(job: Job, draw: random.Random) -> None:
    """Leave no room on the disk for some seconds, in which checkpoints are due."""
    job.cluster.fill_disk()
    job.wait(SHORT_CUT)
    job.cluster.free_disk()


def lock_disk(job: Job, draw: random.Random) -> None:
    """Let nothing be written on the disk for some seconds, in which checkpoints are due."""
    job.cluster.lock_disk()
    job.wait(SHORT_CUT)
    job.cluster.unlock_disk()


def start_second(job: Job, draw: random.Random) -> None:
    """Start another job on the same run directory, which must be refused."""
    cluster = job.cluster
    with (cluster.folder / "second.log").open("w+") as output:
        second = cluster.launch(
            0,
            [*job.words, "parallel.ep=1"],
            ranks=1,
            hosts=1,
            environment={"HEAD": f"{cluster.name(0)}:{SECOND_PORT}"},
            output=output,
        )
        job.wait_for(lambda step: second.poll() is not None, RECOVER_SECONDS)
        output.seek(0)
        said = output.read()
    if second.poll() != REFUSED or "is in use by another run" not in said:
        raise RuntimeError(f"a second job was not refused ({second.poll()}): {said[-2000:]}")


KINDS: dict[str, Callable[[Job, random.Random], None]] = {
    "rank_killed": kill_rank,
    "rank_stopped": stop_rank,
    "host_lost": lose_host,
    "head_lost": lose_head,
    "preempted": ask_agents(signal.SIGTERM),
    "preempted_by_usr1": ask_agents(signal.SIGUSR1),
    "link_cut_shortly": cut_for(SHORT_CUT),
    "link_cut_long": cut_for(LONG_CUT),
    "newest_checkpoint_damaged": damage_newest,
    "disk_full": fill_disk,
    "disk_read_only": lock_disk,
    "second_job": start_second,
}
OF_LINKS = {"link_cut_shortly", "link_cut_long"}  # which a host alone has none of
OF_DISKS = {"disk_full", "disk_read_only"}  # which are of a size, and can be locked
GOES_ON = {"link_cut_shortly", "second_job", *OF_DISKS}  # the ranks that were there finish the step


def shared_disk(cluster: Cluster) -> Path:
    """Make a disk that all hosts see, of a size where they are namespaces. -> where"""
    if cluster.reason is not None:
        print(f"hosts share the loopback of this machine: {cluster.reason}", file=sys.stderr)
        return cluster.folder
    return cluster.mount_disk(DISK)


def note(line: dict[str, Any]) -> None:
    """Add what came of a fault to the results."""
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def impossible(cluster: Cluster) -> set[str]:
    """Name the kinds that these hosts cannot have."""
    alone = OF_LINKS if cluster.size == 1 else set()
    return alone if cluster.reason is None else OF_LINKS | OF_DISKS


def strike(job: Job, kind: str, draw: random.Random) -> dict[str, Any]:
    """Plant a fault in a job that trains, and wait for the next step. -> what came of it"""
    before, began = job.last_step(), time.time()
    KINDS[kind](job, draw)

    def good(step: dict[str, Any]) -> bool:
        anew = step["time"] - step["seconds"] > began  # by ranks that were started since
        goes_on = 1 if kind in GOES_ON else LAST_STEPS if kind in OF_LINKS else math.inf
        return bool(anew or step["step"] > before + goes_on)

    found = job.wait_for(good, RECOVER_SECONDS)
    shape = f"{job.cluster.size}x{job.ranks}"
    line = {"kind": kind, "shape": shape, "timeout_seconds": TIMEOUT_SECONDS}
    if found is None:
        return {**line, "seconds": None, "lost_steps": None}
    lost = max(0, before + 1 - int(found["step"]))
    return {**line, "seconds": round(found["time"] - began, 2), "lost_steps": lost}


def measure(shape: str, kinds: Sequence[str], repeats: int, seed: int, warm: bool) -> None:
    """Plant faults of these kinds in one job, in turns, and write down what comes of each."""
    hosts, ranks = map(int, shape.split("x"))
    draw = random.Random(seed)
    with Cluster(hosts) as cluster:
        words = ["run.steps=1000000", *(["--warm"] if warm else [])]
        job = Job(cluster, ranks, shared_disk(cluster) / "run", words)
        began = time.monotonic()
        if not job.wait_for_steps(12):
            sys.exit(job.said(0).read_text()[-3000:])
        print(f"{shape}: the first steps after {time.monotonic() - began:.1f} s", flush=True)
        for _ in range(repeats):
            for kind in kinds:
                if kind in impossible(cluster):
                    continue
                if warm and not job.wait_for_spares():
                    sys.exit("not every rank has a spare")
                line = {**strike(job, kind, draw), **({"warm": True} if warm else {})}
                print(json.dumps(line), flush=True)
                note(line)
                if line["seconds"] is None:
                    sys.exit("\n".join(job.said(host).read_text()[-3000:] for host in range(hosts)))
                job.wait_for_steps(draw.randint(12, 25))


def summarize() -> None:
    table = Table("fault", "hosts x ranks", "times", "median, s", "worst, s", "most steps lost")
    rows = defaultdict(list)
    for text in RESULTS.read_text().splitlines():
        line = json.loads(text)
        kind = line["kind"] + (", warm" if "warm" in line else "")
        rows[kind, line["shape"]].append(line)
    for (kind, shape), lines in sorted(rows.items()):
        seconds = [line["seconds"] for line in lines if line["seconds"] is not None]
        never = len(lines) - len(seconds)
        worst = f"{never} not in {RECOVER_SECONDS:.0f}" if never else f"{max(seconds):.1f}"
        lost = max((line["lost_steps"] or 0 for line in lines), default=0)
        median = f"{statistics.median(seconds):.1f}" if seconds else ""
        table.add_row(kind, shape, str(len(lines)), median, worst, str(lost))
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["1x4", "2x2"], help="hosts x ranks")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm", action="store_true", help="with a spare process for each rank")
    parser.add_argument("--summary", action="store_true")
    given = parser.parse_args()
    if not given.summary:
        for shape in given.shapes:
            measure(shape, given.kinds, given.repeats, given.seed, given.warm)
    summarize()


if __name__ == "__main__":
    main()
