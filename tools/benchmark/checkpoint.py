"""How long training stands still for a checkpoint, written at once and in the background.

    torchrun --standalone --nproc-per-node 2 tools/benchmark/checkpoint.py

Prints a row a way: of several saves the median of what the training thread waits, of what the write takes in all, and
of a step while nothing is written and while a write is under way.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from moescale.checkpoint.background import BackgroundWriter
from moescale.checkpoint.capture import HostCopy
from moescale.config import parse_config
from moescale.data.batches import Batches
from moescale.data.token_file import prepare_tokens
from moescale.engine.base import build_engine
from moescale.parallel.mesh import start_mesh, stop_mesh, world_size


def main() -> None:
    """Measure and print, as rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary one, if not given")
    given = parser.parse_args()
    ranks = world_size()
    config = parse_config({
        "run": {"steps": 10_000},
        "data": {"seq_len": 64, "global_batch": ranks},
        "model": {"d_model": given.d_model, "num_layers": given.layers},
        "parallel": {"ep": ranks},
    }, "the benchmark").for_world(ranks)
    batches = Batches(prepare_tokens(config.data).train, seq_len=64, global_batch=ranks, seed=0)
    mesh = start_mesh(config)
    engine = build_engine(config, mesh)

    def step() -> float:
        began = time.perf_counter()
        engine.forward_backward(batches.micro_batches(engine.step_count, mesh.batch_rank, mesh.batch_size, 1))
        engine.step()
        return time.perf_counter() - began

    for _ in range(3):
        step()
    alone = statistics.median(step() for _ in range(10))
    own = sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in engine.capture({}, {}).tensors.values())
    with tempfile.TemporaryDirectory(dir=given.folder) as shared:
        folders = [shared]
        if mesh.world_group is not None:
            dist.broadcast_object_list(folders)
        if mesh.rank == 0:
            print(f"{own / 1e6:,.0f} MB a rank, {ranks} ranks; a step alone {alone * 1e3:,.0f} ms\n"
                  "| written | stall, ms | in all, ms | a step meanwhile, ms |\n|---|---|---|---|")
        for way in ("at once", "in the background"):
            host = HostCopy() if way != "at once" else None
            stalls, whole, meanwhile = [], [], []
            for _ in range(given.saves + 1):
                writer, began = BackgroundWriter(), time.perf_counter()
                moment = engine.capture({}, {}, host)
                write: Callable[[], Path] = partial(moment.write, Path(folders[0]), 1, mesh.checkpoint_group)
                writer.start(write)
                if host is None:
                    writer.wait()
                stalls.append(time.perf_counter() - began)
                if host is None:
                    whole.append(stalls[-1])
                    step()
                    continue
                while True:  # as many steps on every rank as rank 0 says
                    over = torch.tensor(int(writer.is_over))
                    if mesh.world_group is not None:
                        dist.all_reduce(over)
                    if over > 0:
                        break
                    meanwhile.append(step())
                writer.wait()
                whole.append(time.perf_counter() - began)
            if mesh.rank == 0:  # the first save of each way makes files, memory and threads
                beside = f"{statistics.median(meanwhile) * 1e3:,.0f}" if meanwhile else "-"
                print(f"| {way} | {statistics.median(stalls[1:]) * 1e3:,.0f} | "
                      f"{statistics.median(whole[1:]) * 1e3:,.0f} | {beside} |", flush=True)
        if mesh.world_group is not None:
            dist.barrier()
    stop_mesh()


if __name__ == "__main__":
    main()
