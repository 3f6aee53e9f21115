"""The layout that rank 0 draws is the one that the mesh builds."""

from __future__ import annotations

import torch.distributed as dist

from moescale.config import parse_config
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from moescale.planner.picture import axis_groups, draw_layout

SIXTEEN = {"pp": 2, "tp": 2, "ep": 4, "dp_shard": 4}


def test_a_layout_says_who_shares_what_and_what_goes_between_hosts() -> None:
    config = parse_config({"data": {"global_batch": 32}, "parallel": SIXTEEN}, "test").for_world(16)
    first, *lines = draw_layout(config, ["node0"] * 8 + ["node1"] * 8)
    assert first == "layout of 16 ranks: 0-7 on node0, 8-15 on node1"
    assert [line.split("  ")[1] for line in lines] == ["pp 2", "fsdp 4", "tp 2", "efsdp 2", "ep 4",
                                                       "layers of each stage"]
    assert "0 8 | 1 9 | 2 10 | ... 8 groups" in lines[0]
    assert lines[0].endswith("between hosts")
    assert "0 2 4 6 | 1 3 5 7 | 8 10 12 14 | ... 4 groups" in lines[1]
    assert lines[1].endswith("within hosts")
    assert "0-3 | 4-7 | 8-11 | ... 4 groups" in lines[4]
    assert lines[5].count(":") == 2
    assert all(len(line) < 100 for line in (first, *lines))
    assert draw_layout(parse_config({}, "test").for_world(1), ["here"]) == []


def groups_of_mesh(parallel: dict) -> dict[str, list[int]]:
    config = parse_config({"data": {"global_batch": 8}, "parallel": parallel}, "test").for_world(4)
    mesh = start_mesh(config)
    assert mesh.dense is not None
    assert mesh.sparse is not None
    try:
        return {name: dist.get_process_group_ranks(view[name].get_group())
                for view, names in ((mesh.dense, ("pp", "dp_replicate", "fsdp", "tp")), (mesh.sparse, ("efsdp", "ep")))
                for name in names}
    finally:
        stop_mesh()


def test_groups_are_those_of_the_mesh() -> None:
    for parallel, dense, sparse in (({"tp": 2, "ep": 2}, (1, 1, 2, 2), (1, 1, 2, 2, 1)),
                                    ({"pp": 2, "ep": 2}, (2, 1, 2, 1), (2, 1, 1, 2, 1))):
        places = {"pp": (dense, 0), "dp_replicate": (dense, 1), "fsdp": (dense, 2), "tp": (dense, 3),
                  "efsdp": (sparse, 2), "ep": (sparse, 3)}
        for rank, found in enumerate(run_ranks(4, groups_of_mesh, parallel, timeout_seconds=60)):
            for name, ranks in found.items():
                assert ranks in axis_groups(*places[name]), (rank, name)
                assert rank in ranks
