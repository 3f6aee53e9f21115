"""Plants single bit flips in a small run, and counts how many an audit finds, names and mends, and what it costs.

    python tools/audit_flips.py --flips 1000 --ranks 2

Flips are of weights between two audits, and of activations and gradients in the step that is audited; with --anywhere
those too come in any step of the interval, most of which nobody looks at. Values stay finite numbers. An interval in
which nothing was found is taken again without its flip: where that leaves the same weights and moments, bit for bit, on
every rank, the flip was lost in rounding and did no harm.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moescale.audit import Audit
from moescale.comm.collectives import local_tensor
from moescale.config import parse_config
from moescale.data.batches import Batch
from moescale.engine.base import StepLosses
from moescale.engine.native import NativeEngine
from moescale.parallel.mesh import start_mesh, stop_mesh, world_size
from moescale.parallel.ranks import run_ranks

SEQ, BATCH, VOCAB = 32, 4, 264
KINDS = ("weight", "activation", "gradient")


def flip(tensor: Tensor, draw: random.Random) -> bool:
    """Flip a random bit of a random element in place, such that it stays a finite number."""
    flat = local_tensor(tensor).detach().view(-1)
    if not flat.numel():
        return False
    for _ in range(100):
        element, bit = draw.randrange(flat.numel()), draw.randrange(32)
        number = int(flat[element].view(torch.int32)) ^ (1 << bit if bit < 31 else -(1 << 31))
        value = torch.tensor(number, dtype=torch.int32).view(torch.float32)
        if bool(value.isfinite()):
            flat[element] = value
            return True
    return False


class Planted(NativeEngine):
    """Flips one bit of what a layer puts out, or of a gradient, in the next run of the passes."""

    plan: tuple[str, random.Random] | None = None

    def place(self, kind: str, draw: random.Random) -> None:
        self.plan = kind, draw

    def forward_backward(self, batches: Sequence[Batch], *, watch: bool = True) -> StepLosses:
        plan, self.plan = self.plan, None
        if plan is None:
            return super().forward_backward(batches, watch=watch)
        kind, draw = plan
        within = kind == "activation" or draw.random() < 0.5  # a gradient of activations, before ranks add up theirs
        leaves = [module for module in self.model.blocks.modules()
                  if not list(module.children()) and list(module.parameters())]
        module, left = draw.choice(leaves), [True]

        def spoil(tensor: Tensor) -> Tensor:
            changed = tensor.clone()
            if left and flip(changed, draw):
                left.clear()
            return changed

        def see(_: nn.Module, __: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not left:
                return output
            if kind == "activation":
                return spoil(output)
            if output.requires_grad:
                output.register_hook(lambda grad: spoil(grad) if left else grad)
            return output

        hook = module.register_forward_hook(see) if within else None
        losses = super().forward_backward(batches, watch=watch)
        if hook is not None:
            hook.remove()
        else:
            grads = [weight.grad for weight in self.parameters().values() if weight.grad is not None]
            flip(draw.choice(grads), draw)
        return losses


def make_batches(step: int, rank: int, ranks: int) -> list[Batch]:
    tokens = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(step))
    token_id = torch.arange(BATCH * SEQ).view(BATCH, SEQ) + step * BATCH * SEQ
    parts = (tokens[:, :-1], tokens[:, 1:], torch.arange(SEQ).repeat(BATCH, 1), token_id)
    share = BATCH // ranks
    return [Batch(*(part[rank * share : (rank + 1) * share].contiguous() for part in parts))]


def everything(engine: NativeEngine) -> list[Tensor]:
    """List this rank's weights and moments."""
    moments = [moment for state in engine.optimizer.state.values() for moment in state.values()
               if isinstance(moment, Tensor)]
    return [local_tensor(tensor).detach() for tensor in (*engine.parameters().values(), *moments)]


def all_agree(mine: bool) -> bool:
    """Say whether it is so on every rank."""
    answer = torch.tensor(int(mine))
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


def plant(flips: int, interval: int, anywhere: bool, seed: int) -> dict[str, Any]:
    """Train as this rank, with a flip in each interval. Returns counts, and the seconds of steps."""
    config = parse_config({
        "model": {"vocab_size": VOCAB, "d_model": 32, "num_layers": 2},
        "data": {"seq_len": SEQ, "global_batch": BATCH}, "moe": {"num_experts": 4, "top_k": 2, "d_ff": 32},
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
        "parallel": {"dp_replicate": world_size()}, "optim": {"lr": 1e-3},
        "run": {"steps": (flips + 1) * interval}}, "audit_flips").for_world(world_size())
    mesh = start_mesh(config)
    engine = Planted(config, mesh)
    audit = Audit(engine, mesh, interval, [f"host{rank}" for rank in range(mesh.world_size)])
    counts: Counter[str] = Counter()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    draw = random.Random(seed)

    def take(flipped: int | None, kind: str, rank: int, own: random.Random) -> list[str]:
        """Take the steps of an interval, on this rank with a flip in step `flipped`. Returns what the audit says."""
        said: list[str | None] = []
        for step in range(1, interval + 1):
            if step == flipped and mesh.rank == rank:
                if kind == "weight":
                    flip(own.choice(list(engine.parameters().values())), own)
                else:
                    engine.place(kind, own)
            due, began = audit.is_due(step), time.perf_counter()
            batches = make_batches(engine.step_count, mesh.batch_rank, mesh.batch_size)
            if due:
                said.append(audit.forward_backward(batches, watch=False)[1])
            else:
                engine.forward_backward(batches, watch=False)
            engine.step()
            if due:
                said.append(audit.compare_copies(step))
            if not any(said):  # a step that is mended takes longer
                seconds[due].append(time.perf_counter() - began)
        return [text for text in said if text is not None]

    def go_back(kept: list[Tensor]) -> None:
        for tensor, before in zip(everything(engine), kept, strict=True):
            tensor.copy_(before)

    for number in range(flips):
        kind, rank = KINDS[number % len(KINDS)], draw.randrange(mesh.world_size)
        at = draw.randint(1, interval) if anywhere or kind == "weight" else interval
        own = random.Random(seed + number + 1)
        kept = [tensor.clone() for tensor in everything(engine)]
        texts, began_at = take(at, kind, rank, own), engine.step_count - interval
        counts[f"{kind} planted"] += 1
        counts[f"{kind} found"] += bool(texts)
        counts[f"{kind} named"] += any(f"rank {rank} (" in text for text in texts)
        if not texts:
            left = [tensor.clone() for tensor in everything(engine)]
            go_back(kept)
            engine.step_count = began_at
            take(None, kind, rank, own)
            same = all(torch.equal(tensor, before) for tensor, before in zip(everything(engine), left, strict=True))
            counts[f"{kind} harmless"] += int(all_agree(same))
        go_back(kept)
    stop_mesh()
    return {"counts": counts, "seconds": {due: sorted(some)[len(some) // 2] for due, some in seconds.items() if some}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--interval", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--anywhere", action="store_true")
    given = parser.parse_args()
    result = run_ranks(given.ranks, plant, given.flips, given.interval, given.anywhere, given.seed,
                       timeout_seconds=3600)[0]
    counts = result["counts"]
    for kind in (*KINDS, "all"):
        planted, found, named, harmless = (
            sum(counts[f"{each} {word}"] for each in (KINDS if kind == "all" else (kind,)))
            for word in ("planted", "found", "named", "harmless"))
        print(f"{kind}: {planted} flips, {found} found ({found / max(1, planted):.2%}), {named} with the rank named; "
              f"{harmless} left no other bit; found of the rest: {found / max(1, planted - harmless):.2%}")
    plain, audited = result["seconds"][False], result["seconds"][True]
    print(f"a step takes {plain * 1e3:.1f} ms, an audited one {audited * 1e3:.1f} ms: run.audit_every="
          f"{(audited - plain) / plain / 0.01:.0f} costs 1 % of each step")


if __name__ == "__main__":
    main()
