"""Several hosts on one machine: network namespaces behind a switch, joined by links of a set
bandwidth.

    python tools/cluster.py --hosts 2 --ranks 2 --bandwidth 1gbit -- \\
        train configs/quickstart.yaml parallel.ep=4

Starts launch/torchrun.sh on each host with the words behind `--`, shows what the hosts say, and
ends with the highest of their exit statuses. Needs root, `ip` and `tc`; where namespaces are not
allowed the agents run side by side on loopback, without names, links or bandwidths of their own,
and the reason is said.

`Cluster` does the same in Python, and takes hosts apart and puts them back: links are cut and
mended, hosts are killed, stopped and slowed. Everything of a cluster (processes, namespaces, links,
files) goes when its owner ends, however that ends: a process of its own, the reaper, waits for
that. What a cluster leaves whose reaper was killed as well, the next one clears away.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

ROOT = Path(__file__).parent.parent
MARK = "MOESCALE_CLUSTER"  # in the environment of every process of a host: FOLDER/HOST
PREFIX = "moescale-cluster-"
PORT = 29500
LINK = "eth0"
FILLING = "filling"
KILL_SECONDS = 20.0
LOCK_SECONDS = 20.0
BURST_BYTES = 128 * 1024
SLICE_SECONDS = 0.02  # of a slowed host, in part of which it runs
# A name for the host, its own table of names, then the command in the same process.
ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


class ClusterError(RuntimeError):
    """A host cannot be what was asked for; the message says why."""


class Cluster:
    """Hosts of one machine, as a context.

    reason: why they are no namespaces; None where they are. bandwidth, within: of the link of each
    host and among its own ranks, as tc writes them, e.g. 1gbit; None = all that the machine gives.
    """

    def __init__(self, hosts: int, bandwidth: str | None = None, within: str | None = None) -> None:
        self.size, self.bandwidth, self.within = hosts, bandwidth, within
        self.reason: str | None = None
        self._slowed: dict[int, threading.Event] = {}

    def __enter__(self) -> Self:
        clear_leftovers()
        self.folder, self._lock = _make_folder()
        self._reaper = subprocess.Popen(
            [sys.executable, __file__, "--reap", str(self.folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            pass_fds=[self._lock],
        )
        try:
            self._build()
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            self.reason = (
                "only root may make namespaces" if os.geteuid() != 0 else " ".join(said.split())
            )
        self._port = PORT if self.reason is None else _free_port()
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._slowed.values():
            running.set()
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait()
        os.close(self._lock)

    # ---- what runs

    def name(self, host: int) -> str:
        """Give the name by which the others find a host."""
        return f"host{host}" if self.reason is None else "localhost"

    def start(
        self,
        host: int,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        output: IO[Any] | None = None,
    ) -> subprocess.Popen[Any]:
        """Start a command on a host. output: where it writes; None = where this process does"""
        given = {**os.environ, MARK: f"{self.folder.name}/{host}", **(environment or {})}
        words = list(command)
        if self.reason is None:
            given["GLOO_SOCKET_IFNAME"] = LINK
            enter = f"ip netns exec {self._space(host)} unshare --uts --mount sh -c".split()
            names = str(self.folder / "hosts")
            words = [*enter, ENTER, "sh", self.name(host), names, *words]
        return subprocess.Popen(
            words,
            env=given,
            stdin=subprocess.DEVNULL,
            stdout=output,
            start_new_session=True,
            stderr=None if output is None else subprocess.STDOUT,
        )

    def launch(
        self,
        host: int,
        arguments: Sequence[str],
        *,
        ranks: int,
        hosts: int | None = None,
        restarts: int = 0,
        environment: Mapping[str, str] | None = None,
        output: IO[Any] | None = None,
    ) -> subprocess.Popen[Any]:
        """Start the agent of one host, which starts its ranks.

        arguments: words of `moescale`, `train` or `doctor` first. hosts: how many of them the job
        has; None = all. restarts: how often the agents start the ranks again.
        """
        given = {
            "NODES": str(hosts or self.size),
            "HEAD": f"{self.name(0)}:{self._port}",
            "RANKS": str(ranks),
            "RESTARTS": str(restarts),
            "COMMAND": arguments[0],
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"),
            **(environment or {}),
        }
        return self.start(host, [str(ROOT / "launch/torchrun.sh"), *arguments[1:]], given, output)

    def processes(self, host: int) -> dict[int, dict[str, str]]:
        """Find all processes of a host that live. -> their environments, by process id"""
        return _marked(f"{self.folder.name}/{host}")

    def ranks(self, host: int) -> dict[int, int]:
        """Find the processes that train on a host. -> process ids, by rank

        Such a process is started by an agent, or is forked of a spare for one that an agent
        started; a spare has outlived the process that started it (`moescale/warm.py`).
        """
        all_here = self.processes(host)
        marked = {pid: given for pid, given in all_here.items() if "LOCAL_RANK" in given}
        parents = {pid: _parent(pid) for pid in marked}
        spares = {pid for pid, parent in parents.items() if parent not in all_here}
        started = {pid for pid, parent in parents.items() if parent in all_here.keys() - marked}
        forked = {
            marked[pid]["LOCAL_RANK"]: pid for pid, parent in parents.items() if parent in spares
        }
        return {
            int(marked[pid]["RANK"]): forked.get(marked[pid]["LOCAL_RANK"], pid) for pid in started
        }

    # ---- taking apart, putting back

    def signal(self, host: int, number: signal.Signals) -> None:
        """Send a signal to all processes of a host."""
        for pid in self.processes(host):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self, host: int) -> None:
        """Lose a host: end all of its processes at once; new ones find its network as it was."""
        _kill_all(f"{self.folder.name}/{host}")

    def stop(self, host: int) -> None:
        """Stop a host in its tracks; it answers no more, but its connections stay."""
        self.signal(host, signal.SIGSTOP)

    def slow(self, host: int, share: float) -> None:
        """Let a host compute only this share of the time, above 0, until it is restored."""
        self._hurry(host)
        self._slowed[host] = threading.Event()
        threading.Thread(
            target=self._hold_back, args=(host, share, self._slowed[host]), daemon=True
        ).start()

    def cut(self, host: int) -> None:
        """Cut the link of a host: nothing arrives, and nobody is told."""
        self._need_links()
        _run(f"ip -n {self._switch} link set port{host} down")

    def mend(self, host: int) -> None:
        """Mend the link of a host."""
        self._need_links()
        _run(f"ip -n {self._switch} link set port{host} up")

    def limit(self, host: int, bandwidth: str | None) -> None:
        """Set the bandwidth of a host's link, both ways."""
        self._need_links()
        _shape(self._space(host), LINK, bandwidth)
        _shape(self._switch, f"port{host}", bandwidth)

    def restore(self, host: int) -> None:
        """Undo what was done to a host, but for processes that have ended."""
        self._hurry(host)
        if self.reason is None:
            self.mend(host)
            self.limit(host, self.bandwidth)
        self.signal(host, signal.SIGCONT)

    def sent_bytes(self, host: int) -> int:
        """Count what a host has sent to other hosts so far, with all headers."""
        self._need_links()
        told = json.loads(_run(f"ip -n {self._space(host)} -s -j link show {LINK}"))
        return int(told[0]["stats64"]["tx"]["bytes"])

    def mount_disk(self, size: str) -> Path:
        """Make a disk of this size, in memory, for the hosts that start from now on. -> where"""
        self._need_links()
        disk = self.folder / "disk"
        disk.mkdir()
        _run(f"mount -t tmpfs -o size={size} tmpfs {disk}")
        return disk

    def fill_disk(self) -> None:
        """Leave no room on the disk."""
        with suppress(OSError), (self.folder / "disk" / FILLING).open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))

    def free_disk(self) -> None:
        """Give the room on the disk back."""
        (self.folder / "disk" / FILLING).unlink(missing_ok=True)

    def lock_disk(self) -> None:
        """Let nothing more be written on the disk; a write under way ends first."""
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                _run(f"mount -o remount,ro {self.folder / 'disk'}")
                return
            except subprocess.CalledProcessError:  # a file is being written
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def unlock_disk(self) -> None:
        """Let the disk be written on again."""
        _run(f"mount -o remount,rw {self.folder / 'disk'}")

    # ---- how

    @property
    def _switch(self) -> str:
        return f"{self.folder.name}-switch"

    def _space(self, host: int) -> str:
        return f"{self.folder.name}-{host}"

    def _build(self) -> None:
        """Make a namespace for the switch and one for each host, with a link between."""
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"10.77.0.{host + 1} host{host}\n" for host in range(self.size))
        )
        switch = self._switch
        _run(f"ip netns add {switch}")
        _run(f"ip -n {switch} link add switch type bridge")
        _run(f"ip -n {switch} link set switch up")
        for host in range(self.size):
            space, port = self._space(host), f"port{host}"
            _run(f"ip netns add {space}")
            _run(f"ip -n {switch} link add {port} type veth peer name {LINK} netns {space}")
            _run(f"ip -n {switch} link set {port} master switch up")
            _run(f"ip -n {space} addr add 10.77.0.{host + 1}/24 dev {LINK}")
            _run(f"ip -n {space} link set {LINK} up")
            _run(f"ip -n {space} link set lo up")
            _shape(space, "lo", self.within)
            self.limit(host, self.bandwidth)

    def _need_links(self) -> None:
        if self.reason is not None:
            raise ClusterError(f"hosts have no links of their own here: {self.reason}")

    def _hurry(self, host: int) -> None:
        running = self._slowed.pop(host, None)
        if running is not None:
            running.set()

    def _hold_back(self, host: int, share: float, restored: threading.Event) -> None:
        while not restored.wait(SLICE_SECONDS * share):
            self.signal(host, signal.SIGSTOP)
            restored.wait(SLICE_SECONDS * (1 - share))
            self.signal(host, signal.SIGCONT)


def clear_leftovers() -> None:
    """Clear away clusters whose owners and reapers have ended."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        lock = _lock(folder)
        if lock is not None:
            _clear(folder)
            os.close(lock)


def _make_folder() -> tuple[Path, int]:
    """Make and lock a folder for a cluster; owner and reaper hold the lock as long as they live."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        lock = _lock(folder)
        if lock is not None and folder.exists():  # nobody took it for a leftover
            return folder, lock


def _lock(folder: Path) -> int | None:
    """Lock a folder. -> a descriptor that holds the lock; None where another process does"""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            os.close(descriptor)
    return None


def leftovers(token: str) -> list[str]:
    """Find what is left of a cluster: files, namespaces, processes. token: the name of its
    folder"""
    places = (Path(tempfile.gettempdir()), Path("/run/netns"))
    found = [str(path) for place in places for path in place.glob(f"{token}*")]
    return found + [f"process {pid}" for pid in _marked(token + "/")]


def _reap(folder: Path) -> None:
    """Wait until the owner of a cluster ends or closes the pipe, then clear away what it had."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    owner = os.getppid()
    while os.getppid() == owner:  # the pipe may live on in a process that the owner forked
        if select.select([sys.stdin], [], [], 0.5)[0]:
            break
    _clear(folder)


def _clear(folder: Path) -> None:
    """Remove the processes, namespaces, links and files of a cluster."""
    _kill_all(folder.name + "/")
    with suppress(OSError, subprocess.CalledProcessError):
        for line in _run("ip netns list").splitlines():
            if line.startswith(folder.name):
                _run(f"ip netns del {line.split()[0]}")  # the links go with it
    if os.path.ismount(folder / "disk"):
        _run(f"umount --lazy {folder}/disk")
    shutil.rmtree(folder, ignore_errors=True)


def _kill_all(mark: str) -> None:
    """Kill until two looks in a row find nobody: a process that is about to run another program
    shows no mark."""
    deadline, clear = time.monotonic() + KILL_SECONDS, 0
    while clear < 2 and time.monotonic() < deadline:
        found = _marked(mark)
        clear = 0 if found else clear + 1
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _marked(mark: str) -> dict[int, dict[str, str]]:
    """Find the living processes whose mark is this, or begins so if it ends with a slash."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            text = (entry / "environ").read_bytes().decode(errors="replace")
            given = dict(word.split("=", 1) for word in text.split("\0") if "=" in word)
            own = given.get(MARK, "")
            if own == mark or (mark.endswith("/") and own.startswith(mark)):
                found[int(entry.name)] = given
    return found


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _run(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


def _shape(space: str, link: str, bandwidth: str | None) -> None:
    """Set what a link lets through in one direction; None = all."""
    if bandwidth is None:
        with suppress(subprocess.CalledProcessError):  # there was no limit
            _run(f"tc -n {space} qdisc del dev {link} root")
        return
    burst = max(BURST_BYTES, int(_bits_per_second(bandwidth) / 8 / 1000))  # within a millisecond
    _run(
        f"tc -n {space} qdisc replace dev {link} root tbf rate {bandwidth} burst {burst} latency 400ms"
    )


def _bits_per_second(bandwidth: str) -> float:
    found = re.fullmatch(r"([0-9.]+)([kmg]?)bit", bandwidth)
    if found is None:
        raise ClusterError(f"bandwidth {bandwidth}: write it as 200mbit or 1gbit")
    return float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2]]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    if sys.argv[1:2] == ["--reap"]:
        return _reap(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="on each host")
    parser.add_argument(
        "--bandwidth", help="of the link of each host, e.g. 1gbit; all that the machine gives"
    )
    parser.add_argument("--within", help="among the ranks of a host")
    parser.add_argument(
        "--restarts", type=int, default=0, help="how often the agents start the ranks again"
    )
    parser.add_argument("command", nargs="+", metavar="-- train CONFIG [KEY=VALUE ...]")
    given = parser.parse_args()
    with Cluster(given.hosts, given.bandwidth, given.within) as cluster:
        if cluster.reason is not None:
            print(f"hosts share the loopback of this machine: {cluster.reason}", file=sys.stderr)
        agents = [
            cluster.launch(host, given.command, ranks=given.ranks, restarts=given.restarts)
            for host in range(given.hosts)
        ]

        def pass_on(number: int, frame: FrameType | None) -> None:
            for agent in agents:
                agent.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, pass_on)
        status = max(agent.wait() % 256 for agent in agents)
    sys.exit(status)


if __name__ == "__main__":
    main()
