"""Hosts on one machine have links that can be cut and limited, and leave nothing behind however
their owner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.command_line import ROOT

sys.path.append(str(ROOT / "tools"))  # its scripts find each other so
from cluster import Cluster, ClusterError, clear_leftovers, leftovers

LISTEN = """
import socket
server = socket.create_server(("", 5000))
while True:
    other = server.accept()[0]
    while other.recv(1 << 16):
        pass
    other.sendall(b"!")
    other.close()
"""
SEND = """
import socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[2])) as other:
    other.sendall(bytes(int(sys.argv[3])))
    other.shutdown(socket.SHUT_WR)
    assert other.recv(1) == b"!"
print(time.monotonic() - began)
"""
OWN = """
import sys, time
from cluster import Cluster
with Cluster(2) as cluster:
    for host in range(2):
        cluster.start(host, ["sleep", "100"])
    print(cluster.folder.name, cluster._reaper.pid, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(2, "1gbit") as cluster:
        if cluster.reason is not None:
            pytest.skip(cluster.reason)
        cluster.start(1, [sys.executable, "-c", LISTEN])
        wait_for(lambda: send(cluster, 1) is not None)
        yield cluster
    assert not leftovers(cluster.folder.name)


def send(cluster: Cluster, size: int, seconds: float = 0.5) -> float | None:
    """Send some bytes from host 0 to host 1. -> seconds; None if they did not come within the time
    given"""
    command = [sys.executable, "-c", SEND, "host1", str(seconds), str(size)]
    process = cluster.start(0, command, output=subprocess.PIPE)
    said = process.communicate()[0].decode()
    return float(said) if process.returncode == 0 else None


def wait_for(true: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_links_are_cut_and_mended_and_as_fast_as_they_are_set(cluster: Cluster) -> None:
    before = cluster.sent_bytes(0)
    fast = send(cluster, 2_000_000, 10)
    assert 2_000_000 < cluster.sent_bytes(0) - before < 2_300_000
    assert fast is not None
    for host in range(2):  # what leaves the first one, and what arrives at the second
        cluster.limit(host, "20mbit")
        slow = send(cluster, 2_000_000, 10)
        assert slow is not None
        assert fast < 0.4 < 0.6 < slow
        cluster.restore(host)
    cluster.cut(1)
    assert send(cluster, 1) is None
    cluster.restore(1)
    again = send(cluster, 2_000_000, 10)
    assert again is not None
    assert again < 0.4


def test_hosts_are_stopped_slowed_killed_and_started_again(cluster: Cluster) -> None:
    cluster.stop(1)
    assert send(cluster, 1) is None
    cluster.restore(1)
    assert send(cluster, 1, 10) is not None
    spin = [sys.executable, "-c", "while True: pass"]
    used = []
    for share in (1.0, 0.25):
        spinning = cluster.start(0, spin)
        if share < 1:
            cluster.slow(0, share)
        time.sleep(0.8)
        ticks = Path(f"/proc/{spinning.pid}/stat").read_text().rpartition(")")[2].split()
        used.append(int(ticks[11]) / 100)
        cluster.kill(0)
        assert not cluster.processes(0)
        spinning.wait()
        cluster.restore(0)
    assert used[1] < 0.7 * used[0]
    cluster.kill(1)
    assert send(cluster, 1) is None
    cluster.start(1, [sys.executable, "-c", LISTEN])
    wait_for(lambda: send(cluster, 1) is not None)


def test_a_disk_is_filled_and_freed(cluster: Cluster) -> None:
    disk = cluster.mount_disk("4m")
    cluster.fill_disk()
    with pytest.raises(OSError, match="No space"):
        (disk / "file").write_bytes(bytes(1 << 16))
    cluster.free_disk()
    (disk / "file").write_bytes(bytes(1 << 16))


@pytest.mark.parametrize(
    "reaper", [True, False], ids=["a reaper lives", "its reaper is killed too"]
)
def test_nothing_is_left_of_a_cluster_whose_owner_is_killed(reaper: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tools"}
    command = [sys.executable, "-c", OWN]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert owner.stdout is not None
        token, reaper_pid = owner.stdout.readline().split()
        wait_for(lambda: len([found for found in leftovers(token) if "process" in found]) == 2)
        if not reaper:
            os.kill(int(reaper_pid), signal.SIGKILL)
    finally:
        owner.kill()
        owner.wait()
    if reaper:
        wait_for(lambda: not leftovers(token))

    def cleared() -> bool:
        clear_leftovers()
        return not leftovers(token)

    wait_for(cleared)  # a reaper that was just killed may still hold the lock


def test_agents_on_loopback_say_why_they_have_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nowhere")
    with Cluster(2) as cluster:
        assert cluster.reason == "only root may make namespaces"
        process = cluster.start(1, [sys.executable, "-c", "import time; time.sleep(100)"])
        with pytest.raises(ClusterError, match="only root"):
            cluster.cut(1)
        cluster.kill(1)
        assert process.wait() == -signal.SIGKILL
    assert not leftovers(cluster.folder.name)
