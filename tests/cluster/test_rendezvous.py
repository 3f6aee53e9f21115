"""Nodes meet again when one of them was lost and another one takes its place."""

from __future__ import annotations

import threading

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters

from moescale.cluster.agreement import STOPPED
from moescale.cluster.rendezvous import BoundRendezvous, create_rendezvous
from tests.support.ports import free_port


def node(port: int, least: int = 2) -> BoundRendezvous:
    """Make one of two nodes of a job, which is taken for lost after two seconds of silence."""
    return create_rendezvous(RendezvousParameters(
        "c10d", f"127.0.0.1:{port}", "job", least, 2, "127.0.0.1", last_call_timeout=1,
        keep_alive_interval=1, keep_alive_max_attempt=2), "")


def meet(*nodes: BoundRendezvous) -> list[RendezvousInfo]:
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
    port = free_port()
    first, lost = node(port), node(port)
    before = meet(first, lost)
    assert sorted(info.rank for info in before) == [0, 1]
    survivor, gone = (first, lost) if first._get_world()[0] == 0 else (lost, first)
    gone._stop_heartbeats()
    found = meet(survivor, node(port))
    assert sorted(info.rank for info in found) == [0, 1]
    addresses = {(info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port) for info in found}
    assert len(addresses) == 1


def test_nodes_go_on_without_one_that_retires() -> None:
    port = free_port()
    keeper, other = node(port, least=1), node(port, least=1)
    meet(keeper, other)
    assert not keeper.wait_for_change(0.2)
    other.retire()
    assert keeper.wait_for_change(3)
    found = meet(keeper)
    assert [info.world_size for info in found] == [1]
    assert other.num_nodes_waiting() == 0


def test_all_nodes_end_with_the_one_that_keeps_the_store() -> None:
    port = free_port()
    keeper, other = node(port, least=1), node(port, least=1)
    meet(keeper, other)
    keeper.retire()
    assert not other.wait_for_change(3)
    assert other.is_closed()


def test_the_word_of_ranks_that_were_asked_to_leave_is_forgotten_when_nodes_meet_anew() -> None:
    alone = node(free_port(), least=1)
    (before,) = meet(alone)
    where = before.bootstrap_store_info
    kept = PrefixStore("moescale/job", TCPStore(where.master_addr, where.master_port, wait_for_workers=False))
    kept.set(STOPPED, "{}")
    meet(alone)
    assert not kept.check([STOPPED])
