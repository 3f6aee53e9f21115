"""Nodes meet again when one of them was lost and another one takes its place."""

from __future__ import annotations

import socket
import threading

from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters

from moescale.cluster.rendezvous import create_rendezvous


def node(port: int) -> RendezvousHandler:
    """Make one of two nodes of a job, which is taken for lost after two seconds of silence."""
    return create_rendezvous(RendezvousParameters(
        "c10d", f"127.0.0.1:{port}", "job", 2, 2, "127.0.0.1", keep_alive_interval=1, keep_alive_max_attempt=2), "")


def meet(*nodes: RendezvousHandler) -> list[RendezvousInfo]:
    """Let nodes meet at the same time. -> what each has learned; fewer where some are still waiting"""
    found: list[RendezvousInfo] = []
    threads = [threading.Thread(target=lambda node=node: found.append(node.next_rendezvous()), daemon=True)
               for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(6)
    return found


def test_a_node_that_takes_the_place_of_a_lost_one_finds_rank_0() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first, lost = node(port), node(port)
    before = meet(first, lost)
    assert sorted(info.rank for info in before) == [0, 1]
    survivor, gone = (first, lost) if first._get_world()[0] == 0 else (lost, first)
    gone._stop_heartbeats()  # type: ignore[attr-defined]
    found = meet(survivor, node(port))
    assert sorted(info.rank for info in found) == [0, 1]
    addresses = {(info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port) for info in found}
    assert len(addresses) == 1
