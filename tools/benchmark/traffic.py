"""Bytes that each rank sends in one training step, by mesh axis, beside the least that the layout allows.

    python tools/benchmark/traffic.py [CONFIG] [KEY=VALUE ...] [--layouts "tp2, dp2 ep2, ..."] [--passes 4]

Counted where torch hands a collective to its backend: what one rank sends to others in a ring (all-gather, reduce-
scatter: all but its own share; all-reduce: twice that), or by itself (all-to-all, send). The least is arithmetic on the
configuration and on the routing that was drawn:

fsdp    weights of the compute type gathered for forward and again for backward (once where they stay gathered: in a
        pipeline, the outermost weights), gradients reduced once in what precision.reduce says, of exact weights in
        float32; efsdp the same for experts
fsdp_tp the same for weights that tensor parallelism does not cut
tp      a gather before and a scatter behind each mixer and dense feed-forward, the embedding's scatter and the head's
        gather, all of them again in backward; three numbers a token for the loss
cp      keys and values that queries elsewhere look at, and their gradients
ep      each token to each rank of its experts, once, and the answer back, forward and backward; with each assignment
        to an expert elsewhere 12 bytes: which one, its weight, and the weight's gradient. With the hierarchical
        dispatcher ep_nodes and ep_node, the same among the nodes and within one
pp      features and the router's losses to the next stage, and their gradients
small   counts, losses and norms, which have no least

Axes that span all ranks share one group of torch's, and here one row.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moescale.config import Config, load_config, sequence_pieces
from moescale.data.batches import Batch
from moescale.engine.native import NativeEngine
from moescale.moe.hops import Hop
from moescale.moe.layer import MoELayer
from moescale.moe.routing import Routing
from moescale.parallel.context import deal_pieces
from moescale.parallel.mesh import Mesh, start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from moescale.spec.attention import AttentionConfig
from moescale.verify.candidates import parse_layouts

LAYOUTS = ("dp4, tp4, cp4, pp4, dp4 ep4, rep2 dp2 ep2, dp2 tp2, dp2 tp2 ep4, dp2 tp2 ep2, tp2 cp2 ep2 etp2, "
           "dp2 cp2 ep4, dp2 pp2 ep2, tp2 pp2 ep2")
c10d = torch.ops.c10d


class Counter(TorchDispatchMode):
    """Adds up what this rank sends, by process group."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Any) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        others, ranks = group.size() - 1, group.size()
        if func is c10d.allreduce_.default:
            sent = 2 * others * _bytes(args[0][0]) // ranks
        elif func is c10d._allgather_base_.default:
            sent = others * _bytes(args[1])
        elif func is c10d._reduce_scatter_base_.default:
            sent = others * _bytes(args[0])
        elif func is c10d.alltoall_base_.default:
            rows = args[4] or [len(args[1]) // ranks] * ranks
            sent = (sum(rows) - rows[group.rank()]) * _bytes(args[1][:1])
        elif func is c10d.send.default:
            sent = _bytes(args[0][0])
        elif func in (c10d.recv_.default, c10d.barrier.default):
            sent = 0
        else:
            raise NotImplementedError(f"{func} is not counted yet: say what it sends")
        self.sent[group.group_name] += sent


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def axis_names(mesh: Mesh) -> dict[str, list[str]]:
    """List the axes of each process group, by its name; axes of all ranks share one."""
    names: dict[str, list[str]] = defaultdict(list)
    for view in (mesh.data, mesh.dense, mesh.shared, mesh.sparse, mesh.expert, mesh.nodes):
        for axis in (view.mesh_dim_names or ()) if view is not None else ():
            assert view is not None
            if view is mesh.sparse and mesh.expert is not None and axis == "ep":
                continue  # rows travel among the ranks of ep and etp together
            axes = names[view[axis].get_group().group_name]
            axes += [name for name in [{"ep_etp": "ep"}.get(axis, axis)] if name not in axes]
    return names


class Least:
    """The least that this rank has to send in one step."""

    def __init__(
        self, config: Config, mesh: Mesh, engine: NativeEngine, passes: int, travelled: dict[str, int]
    ) -> None:
        """travelled: by axis, what must for the routing that was drawn, over all layers and passes."""
        self.config, self.mesh, self.engine, self.passes = config, mesh, engine, passes
        self.wide = 4
        self.reduced = 2 if config.precision.reduce == "bfloat16" else 4
        self.size = 2 if config.precision.compute == "bfloat16" else 4
        micro_batch = config.data.micro_batch or 1
        self.part = micro_batch * config.data.seq_len // config.parallel.cp  # tokens of a part, a pass
        self.sent: dict[str, float] = defaultdict(float, travelled)
        self._weights()
        self._tensor()
        self._context()
        self._pipeline()

    def _weights(self) -> None:
        pipeline = self.config.parallel.pp > 1
        for name, parameter in self.engine.model.named_parameters():
            if not isinstance(parameter, DTensor):
                continue
            mesh = parameter.device_mesh
            exact = "router" in name or ("norm" in name and self.config.parallel.tp > 1)
            for axis in mesh.mesh_dim_names or ():
                ranks, own = mesh[axis].size(), parameter.to_local().numel()
                if axis in ("fsdp", "efsdp", "fsdp_tp"):
                    kept = not name.startswith("blocks.") and not (exact and name == "norm.weight")
                    gathers = 1 if pipeline or kept else 2 * self.passes
                    self.sent[axis] += (ranks - 1) * own * (
                        gathers * (4 if exact else self.size) + (self.wide if exact else self.reduced))
                elif axis == "dp_replicate":
                    self.sent[axis] += 2 * (ranks - 1) / ranks * own * self.wide

    def _tensor(self) -> None:
        config, tp = self.config, self.config.parallel.tp
        if tp == 1:
            return
        exchanges = 0  # of one part's features: a gather or a scatter
        for piece in self.engine.pieces:
            for block in piece.blocks.values():
                dense = not isinstance(block.channel_mixer, MoELayer)
                exchanges += 4 if dense and config.model.block == "serial" else 2
            exchanges += piece.first + (piece.norm is not None)
        share = (tp - 1) / tp
        self.sent["tp"] = self.passes * 2 * exchanges * share * self.part * config.model.d_model * self.size
        if any(piece.norm is not None for piece in self.engine.pieces):
            self.sent["tp"] += self.passes * 2 * share * 3 * self.part * self.wide

    def _context(self) -> None:
        config, cp = self.config, self.config.parallel.cp
        if cp == 1:
            return
        assert self.mesh.data is not None
        num_pieces = sequence_pieces(cp, config.longest_window)
        pieces, rank = deal_pieces(cp, num_pieces), self.mesh.data.get_local_rank("cp")
        length = config.data.seq_len // num_pieces
        for stage in self.engine.pieces:
            for index in stage.blocks:
                mixer = config.layers[int(index)].mixer
                assert isinstance(mixer, AttentionConfig), "what other mixers exchange is not counted here"
                heads = max(1, mixer.num_kv_heads // config.parallel.tp)
                features = 2 * heads * mixer.head_dim * (config.data.micro_batch or 1)
                positions = self._exchanged(pieces, rank, length, mixer.window or config.data.seq_len)
                self.sent["cp"] += self.passes * features * self.size * positions

    def _exchanged(self, pieces: list[list[int]], rank: int, length: int, window: int) -> int:
        """Count positions: keys and values sent, once per rank that sees them, and gradients of those received."""
        count = 0
        for other, theirs in enumerate(pieces):
            seen = {key for piece in theirs for query in range(piece * length, (piece + 1) * length)
                    for key in range(max(0, query + 1 - window), query + 1)}
            count += sum((key // length in pieces[rank]) == (other != rank) for key in seen)
        return count

    def _pipeline(self) -> None:
        config = self.config
        if config.parallel.pp == 1:
            return
        features = self.part // config.parallel.tp * config.model.d_model * self.size + 2 * self.wide
        for piece in self.engine.pieces:
            self.sent["pp"] += self.passes * features * ((piece.norm is None) + (not piece.first))
        weight = self.engine.pipeline.tied if self.engine.pipeline is not None else None
        if weight is not None:
            self.sent["pp"] += weight.to_local().numel() * self.wide if isinstance(weight, DTensor) else 0


def count(config: Config, passes: int) -> dict[str, tuple[int, float]]:
    """Run one step on this rank. config: settled. -> bytes sent and the least, by axis"""
    mesh = start_mesh(config)
    engine, names = NativeEngine(config, mesh), axis_names(mesh)
    travelled: dict[str, int] = defaultdict(int)
    for module in engine.model.modules():
        for hop in module.dispatcher.hops if isinstance(module, MoELayer) else ():
            assert hop.group is not None
            axis = next(axis for axis in names[hop.group.group_name] if axis.startswith("ep"))
            _count_tokens(hop, travelled, axis)
    generator = torch.Generator().manual_seed(mesh.batch_rank)
    seq, size = config.data.seq_len, config.data.micro_batch or 1
    batches = []
    for number in range(passes):
        tokens = torch.randint(config.model.vocab_size, (size, seq), generator=generator)
        token_id = torch.arange(tokens.numel()).view_as(tokens) + (mesh.batch_rank * passes + number) * tokens.numel()
        batches.append(Batch(tokens, tokens.roll(-1, 1), torch.arange(seq).expand_as(tokens), token_id))
    with Counter() as counter:
        engine.forward_backward(batches)
        engine.step()
    least = Least(config, mesh, engine, passes, travelled).sent
    figures: dict[str, tuple[int, float]] = {}
    for group, sent in counter.sent.items():
        axes = [axis for axis in names.get(group, []) if least.get(axis)]
        key = "+".join(axes) or "small"
        before = figures.get(key, (0, 0.0))
        figures[key] = before[0] + sent, sum(least[axis] for axis in axes)
    stop_mesh()
    return figures


def _count_tokens(hop: Hop, travelled: dict[str, int], axis: str) -> None:
    """Add to `travelled` what must go from this rank in one hop."""
    dispatch, group = hop.dispatch, hop.group
    assert group is not None

    def counting(x: torch.Tensor, routing: Routing) -> Any:
        owners = group.size() // hop.etp
        owner = routing.expert * owners // len(routing.tokens_per_expert)
        has = torch.zeros(len(x), owners, dtype=torch.int64)
        has[routing.token, owner] = 1
        tokens, assignments = has.sum(0), owner.bincount(minlength=owners)
        for rank in range(group.size()):
            if rank != group.rank():
                place = rank // hop.etp
                travelled[axis] += 4 * int(tokens[place]) * x.shape[1] * x.element_size() + 12 * int(assignments[place])
        return dispatch(x, routing)

    hop.dispatch = counting  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. parallel.dispatcher=hierarchical")
    parser.add_argument("--layouts", default=LAYOUTS)
    parser.add_argument("--passes", type=int, default=4)
    arguments = parser.parse_args()
    table = Table("layout", "axis", "sent, bytes a step", "least", "ratio", title="all ranks together")
    config = load_config(arguments.config, arguments.overrides)
    for layout in parse_layouts(arguments.layouts, config):
        share = config.data.global_batch // (layout.dp_replicate * layout.dp_shard)
        settled = layout.settle(config, micro_batch=share // arguments.passes)
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for result in run_ranks(layout.ranks, count, settled, arguments.passes):
            for axis, (sent, least) in result.items():
                totals[axis][0] += sent
                totals[axis][1] += least
        for axis, (sent, least) in totals.items():
            if sent or least:
                table.add_row(str(layout), axis, f"{sent:,.0f}", f"{least:,.0f}" if least else "",
                              f"{sent / least:.3f}" if least else "")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
