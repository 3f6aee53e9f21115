"""What every engine counts and adds up in the same way: the loss of a step, its means, what the routers did.

Losses are sums over the tokens of all ranks divided by one global count, whatever the layout, so that an engine that
runs the passes in its own way still trains on the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moescale.comm.collectives import all_reduce_sum
from moescale.config import Config
from moescale.data.batches import Batch
from moescale.engine.base import LayerCounts, RoutingCounts, StepLosses
from moescale.model.language_model import LanguageModel, LossSums
from moescale.moe.layer import MoELayer
from moescale.moe.routers import SigmoidBiasRouter
from moescale.moe.routing_statistics import COUNTS, SUMS
from moescale.parallel.mesh import Mesh

BLOCKS = 32  # ranks, or blocks of ranks in a row, between which rows are counted
FACTS = ("ranks", "budgets", "spread", "biases", "bytes_sent")  # ranks that hold a layer, and of them those with ...


class StepAccount:
    """The losses of one step: its micro-batches' sums on this rank, over the counts of the global batch."""

    def __init__(self, batches: Sequence[Batch], config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.num_targets, self.num_tokens = global_counts(batches, mesh)
        self.sums = torch.zeros(4, dtype=torch.float64, device=mesh.device)  # by LossSums

    def loss(self, losses: LossSums) -> Tensor:
        """Compute the loss of one micro-batch, whose gradients add up to the step's; its parts join the sums."""
        self.sums.add_(torch.stack(losses).detach())
        model, moe = self.config.model, self.config.moe
        loss = (losses.cross_entropy + model.z_loss_coefficient * losses.output_z) / self.num_targets
        loss = loss + moe.load_balance_coefficient * losses.load_balance / self.num_tokens
        return loss + moe.router_z_coefficient * losses.router_z / self.num_tokens

    def means(self) -> StepLosses:
        """Add up the sums of all ranks, once all micro-batches have run, and divide them by the counts."""
        sums = self.sums.clone()
        sums[:2] /= self.config.parallel.tp  # ranks of tp have the same sums of these
        sums = all_reduce_sum(sums, self.mesh.world_group)
        router_count = self.num_tokens * max(1, self.config.num_moe_layers)
        return StepLosses(sums[0] / self.num_targets, sums[2] / router_count, sums[3] / router_count)


def mean_cross_entropy(total: Tensor, batches: Sequence[Batch], mesh: Mesh) -> float:
    """Divide the cross entropy of all ranks' batches by their targets. total: this rank's sum, scalar float64"""
    num_targets, _ = global_counts(batches, mesh)
    return float(all_reduce_sum(total / mesh.parallel.tp, mesh.world_group) / num_targets)


def global_counts(batches: Sequence[Batch], mesh: Mesh) -> Tensor:
    """Count targets that are not ignored and tokens that are not padding, over all ranks: [2] float32, at least one."""
    counts = [torch.stack(((batch.targets != -100).sum(), (batch.token_id >= 0).sum())) for batch in batches]
    total = all_reduce_sum(torch.stack(counts).sum(0), mesh.world_group) // mesh.batch_copies
    return total.float().clamp(min=1)


def mixtures(model: LanguageModel) -> dict[int, MoELayer]:
    """Find this rank's mixtures of experts, by the index of their block."""
    mixers = {int(index): block.channel_mixer for index, block in model.blocks.items()}
    return {index: mixer for index, mixer in mixers.items() if isinstance(mixer, MoELayer)}


def begin_statistics(layers: Mapping[int, MoELayer], *, watch: bool) -> None:
    """Begin the counts of a step anew. watch: whether more than the load is counted"""
    for layer in layers.values():
        layer.statistics.watch(watch)
        layer.statistics.reset()


def move_biases(layers: Mapping[int, MoELayer], config: Config, mesh: Mesh) -> None:
    """Show each router that balances by a bias the load of its layer, of all ranks; after the optimizer's step.

    That is one collective of all ranks, in a pipeline too: a layer's row is zero where it does not lie.
    """
    if config.moe.router != "sigmoid_bias":
        return
    loads = torch.zeros(config.model.num_layers, config.moe.num_experts, dtype=torch.int64, device=mesh.device)
    for index, layer in layers.items():
        loads[index] = layer.statistics.tokens_per_expert
    all_reduce_sum(loads, mesh.world_group)
    for index, layer in layers.items():
        assert isinstance(layer.router, SigmoidBiasRouter)
        layer.router.balance(loads[index])


def routing_counts(layers: Mapping[int, MoELayer], config: Config, mesh: Mesh) -> RoutingCounts:
    """Add up the counts of all ranks in the last step, in one collective of one tensor."""
    num_experts, blocks = config.moe.num_experts, min(mesh.world_size, BLOCKS)
    rows = torch.zeros(config.model.num_layers, 2 * num_experts + len(COUNTS) + len(SUMS) + len(FACTS),
                       dtype=torch.float64, device=mesh.device)
    sent = [[0] * blocks for _ in range(blocks)]
    for index, layer in layers.items():
        rows[index] = _row(layer, mesh.rank)
        for receiver, number in layer.statistics.sent.items():
            sent[mesh.rank * blocks // mesh.world_size][receiver * blocks // mesh.world_size] += number
    packed = all_reduce_sum(torch.cat((rows.flatten(), rows.new_tensor(sent).flatten())), mesh.world_group)
    host = packed.cpu()  # the one time that the host waits for the device
    counts = {index: _layer_counts(row, num_experts)
              for index, row in enumerate(host[: rows.numel()].view_as(rows).tolist())}
    return RoutingCounts({index: layer for index, layer in counts.items() if layer is not None},
                         host[rows.numel() :].long().view(blocks, blocks).tolist())


def _row(layer: MoELayer, rank: int) -> Tensor:
    """Gather what this rank knows of a layer, [columns] float64: load, counts, sums, facts, biases."""
    statistics, router = layer.statistics, layer.router
    bias = router.expert_bias if isinstance(router, SigmoidBiasRouter) else None
    away = sum(number for receiver, number in statistics.sent.items() if receiver != rank)
    facts = (1, layer.budget is not None, statistics.away is not None, bias is not None,
             away * statistics.row_bytes)
    load, sums = statistics.tokens_per_expert.double(), statistics.sums
    return torch.cat((load, statistics.counts.double(), sums, sums.new_tensor(facts),
                      torch.zeros_like(load) if bias is None else bias.double()))


def _layer_counts(row: list[float], num_experts: int) -> LayerCounts | None:
    """Name what all ranks know of a layer; None where it is no mixture."""
    load, rest = [int(count) for count in row[:num_experts]], iter(row[num_experts:])
    counts, sums, facts = ({name: next(rest) for name in names} for names in (COUNTS, SUMS, FACTS))
    if not facts["ranks"]:
        return None
    spread = bool(facts["spread"])
    return LayerCounts(
        load, dropped=int(counts["dropped"]), wanted=int(counts["wanted"]), tokens=int(counts["tokens"]), **sums,
        surplus=int(counts["surplus"]) if facts["budgets"] else None,
        other_ranks=int(counts["other_ranks"]) if spread else None,
        other_nodes=int(counts["other_nodes"]) if spread else None,
        bytes_sent=int(facts["bytes_sent"]) if spread else None,
        expert_bias=[value / facts["biases"] for value in rest] if facts["biases"] else None,
    )
