"""Silent corruption: a step now and then is run twice and compared bit by bit, and so is what ranks hold alike.

A bit that flips, in a core, in memory or on the way, mostly leaves a finite number behind, so that no guard against NaN
sees it. Two runs of one step on the same machine give the same bits, and ranks that hold copies of the same weights
keep them the same. What was wrong once, in a step that is not run twice, is seen only where it made copies differ.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from moescale.checkpoint.together import Ranks
from moescale.comm.collectives import all_gather, local_tensor
from moescale.data.batches import Batch
from moescale.engine.base import Engine, Features, StepLosses
from moescale.parallel.mesh import Mesh

MOST_RUNS = 4  # of one step, until two in a row agree
SHOWN = 3  # ranks
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes
T = TypeVar("T")
Place = tuple[int, int, int]  # forward 0, backward 1, weights' gradients 2; what a rank computes first comes first


class Audit:
    """Audits the steps of this rank, every so many; every = None audits none. hosts: of each rank."""

    def __init__(self, engine: Engine, mesh: Mesh, every: int | None, hosts: Sequence[str]) -> None:
        self.engine, self.mesh, self.every, self.hosts = engine, mesh, every, hosts
        self.sound = engine.step_count  # the last step after which nothing differed
        self._repeats = True  # whether two runs give the same bits here

    def gone_back(self) -> None:
        """Trust the step that the run went back to."""
        self.sound = self.engine.step_count

    def is_due(self, step: int) -> bool:
        """Whether this step is audited."""
        return self.every is not None and step % self.every == 0

    def forward_backward(self, batches: Sequence[Batch], *, watch: bool) -> tuple[StepLosses, str | None]:
        """Run a step's passes until two runs agree on all ranks. Returns the losses, and in words what did not."""
        problem = None
        losses, before = self._run(batches, watch)
        for _ in range(MOST_RUNS - 1 if self._repeats else 0):
            losses, marks = self._run(batches, watch)
            difference = self._first_difference(before, marks)
            if difference is None:
                return losses, problem and f"{problem}; the step was run again until two runs agreed"
            problem, before = problem or difference, marks
        if problem is not None:
            self._repeats = False
            problem = (f"{problem}; {MOST_RUNS} runs of this step never agreed: this device or layout does not compute "
                       "the same bits twice, and steps are run once from here on")
        return losses, problem

    def compare_copies(self, step: int) -> str | None:
        """Compare the weights and moments that ranks hold alike; all ranks call.

        Returns in words what differs, or None.
        """
        names = [name for mesh, axis, names, marks in self._copies() for name in _suspects(
            all_gather(marks[None], mesh.get_group(axis)).flatten(0, 1), marks, names)]
        told = self._gather(names or None)
        if told is None:
            self.sound = step
            return None
        ranks = [rank for rank, names in enumerate(told) if names]
        name = next(names[0] for names in told if names)
        others = len({name for names in told for name in names or ()}) - 1
        what = f"{name} and {others} other tensors" if others else name
        if len(ranks) == 1:
            return f"{what} on {self._name(ranks, '')} {'are' if others else 'is'} not as other ranks hold it"
        return (f"{what} {'differ' if others else 'differs'} between {self._name(ranks, 'and')}, and which is right is "
                "not known")

    def _run(self, batches: Sequence[Batch], watch: bool) -> tuple[StepLosses, dict[tuple[Place, str], Tensor]]:
        """Run the passes of a step, and mark every tensor that shows."""
        marks: dict[tuple[Place, str], Tensor] = {}

        def mark(place: Place, what: str, tensor: Tensor) -> None:
            passes = sum(key[0] == place for key in marks) if (place, what) in marks else 0
            marks[place, f"{what} (pass {passes + 1})" if passes else what] = fingerprint(tensor)

        def forward(seen: Features) -> None:
            half = int(seen.after == "channel_mixer")
            mark((0, seen.layer, half), f"the output of layer {seen.layer}'s {seen.after}", seen.x)

        def backward(seen: Features) -> None:
            half = int(seen.after == "mixer")
            mark((1, -seen.layer, half), f"the gradient after layer {seen.layer}'s {seen.after}", seen.x)

        self.engine.clear_gradients()
        with self.engine.record(training=True, features=forward, gradients=backward):
            losses = self.engine.forward_backward(batches, watch=watch)
        for index, (name, weight) in enumerate(self.engine.parameters().items()):
            if weight.grad is not None:
                mark((2, 0, index), f"the gradient of {name}", local_tensor(weight.grad))
        return losses, marks

    def _first_difference(
        self, before: Mapping[tuple[Place, str], Tensor], after: Mapping[tuple[Place, str], Tensor]
    ) -> str | None:
        """Find what differed first, and on which ranks; None where all ranks have the same twice."""
        keys = [key for key in after if key in before]
        same = (torch.stack([before[key] for key in keys]) == torch.stack([after[key] for key in keys])).tolist()
        mine = min((key for key, equal in zip(keys, same, strict=True) if not equal), default=None)
        told = self._gather(mine)
        if told is None:
            return None
        place, what = min(each for each in told if each is not None)
        ranks = [rank for rank, each in enumerate(told) if each is not None and each[0] == place]
        return f"{what} on {self._name(ranks, 'or')} was not the same in two runs"

    def _copies(self) -> Iterator[tuple[DeviceMesh, int, list[str], Tensor]]:
        """Give the weights and moments that ranks along one axis of a mesh hold alike: their names and marks.

        Moments are named as in a checkpoint, `optim.MOMENT.WEIGHT`. marks: [tensors] int64.
        """
        found: dict[tuple[DeviceMesh, int], dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in self.engine.capture({}, {}).tensors.items():
            if not isinstance(tensor, DTensor):
                continue
            for axis, placement in enumerate(tensor.placements):
                if isinstance(placement, Replicate) and tensor.device_mesh.size(axis) > 1:
                    found[tensor.device_mesh, axis][name.removeprefix("model.")] = fingerprint(local_tensor(tensor))
        for (mesh, axis), marks in found.items():
            yield mesh, axis, list(marks), torch.stack(list(marks.values()))

    def _gather(self, mine: T | None) -> list[T | None] | None:
        """Bring together what ranks found; None where no rank found anything."""
        some = torch.tensor(mine is not None, dtype=torch.uint8, device=self.mesh.device)
        if self.mesh.world_group is None:
            return None if mine is None else [mine]
        dist.all_reduce(some, dist.ReduceOp.MAX, group=self.mesh.world_group)
        if not some:
            return None
        return Ranks(self.mesh.world_group).gather(mine)

    def _name(self, ranks: Sequence[int], between: str) -> str:
        """Name the ranks that are suspected, with their hosts."""
        shown = [f"rank {rank} ({self.hosts[rank]})" for rank in ranks[:SHOWN]]
        others = [f"{len(ranks) - SHOWN} others"] if len(ranks) > SHOWN else []
        return f" {between} ".join(shown + others)


def fingerprint(tensor: Tensor) -> Tensor:
    """Add up the bits as whole numbers: scalar int64, another one after the flip of any single bit."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.dtype.itemsize]).sum(dtype=torch.int64)


def _suspects(marks: Tensor, mine: Tensor, names: Sequence[str]) -> list[str]:
    """Name the tensors of which this rank's copy is not the one that most ranks hold. marks: [copies, tensors]"""
    suspects = []
    for name, copies, own in zip(names, marks.T.tolist(), mine.tolist(), strict=True):
        if Counter(copies)[own] * 2 <= len(copies):
            suspects.append(name)
    return suspects
