"""Pipeline parallelism: each rank runs some of the layers, on torch's own schedules.

What a stage gives the next is two tensors, the features and the router's losses so far. What decides about tokens every
stage reads for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from moescale.comm.collectives import local_tensor
from moescale.config import Config
from moescale.model.language_model import LanguageModel, LossSums
from moescale.parallel.mesh import Mesh

SCHEDULES = {
    "gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
Inputs = dict[str, Any]
"""tokens, targets, positions, token_id: [batch, seq] int64, as in a Batch."""


def take_stages(whole: LanguageModel, layers: Sequence[range], stages: Sequence[int]) -> list[LanguageModel]:
    """Cut a model. layers: of all stages. stages: those that are wanted. -> a piece of the model for each"""
    last, tied = len(layers) - 1, whole.head is None
    return [_take(whole, layers[stage], first=stage == 0, last=stage == last, tied=tied) for stage in stages]


def join(pieces: Sequence[LanguageModel]) -> LanguageModel:
    """Put pieces under the names that their parts have in the whole model."""
    one, last = pieces[0], pieces[-1]
    blocks = {int(index): block for piece in pieces for index, block in piece.blocks.items()}
    return LanguageModel(one.embedding or last.embedding, blocks, last.norm, last.head, first=one.first,
                         logit_scale=one.logit_scale, compute_dtype=one.compute_dtype, sinusoidal=one.sinusoidal)


def _take(whole: LanguageModel, layers: range, *, first: bool, last: bool, tied: bool) -> LanguageModel:
    return LanguageModel(
        whole.embedding if first or (last and tied) else None,
        {index: whole.blocks[str(index)] for index in layers},
        whole.norm if last else None, whole.head if last else None,
        first=first, logit_scale=whole.logit_scale, compute_dtype=whole.compute_dtype, sinusoidal=whole.sinusoidal,
    )


class Pipeline:
    """Runs the pieces of this rank in concert with the other ranks of `pp`."""

    def __init__(self, pieces: Sequence[LanguageModel], config: Config, mesh: Mesh) -> None:
        assert mesh.dense is not None
        self.pieces, self.parallel, self.mesh = pieces, config.parallel, mesh
        self.group = mesh.dense["pp"].get_group()
        self.d_model = config.model.d_model
        weights = [piece.embedding.weight for piece in pieces if piece.embedding is not None]
        self.tied = weights[0] if config.model.tied_embeddings and weights else None  # used on two ranks
        self._loss: Callable[[LossSums], Tensor] = lambda sums: sums.cross_entropy
        self._schedules: dict[tuple[int, torch.Size], ScheduleGPipe] = {}

    def forward_backward(self, inputs: Sequence[Inputs], loss: Callable[[LossSums], Tensor]) -> None:
        """Run micro-batches of one shape forward and backward. loss: called with each one's sums on the last stage."""
        joined: Inputs = {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}
        tokens = joined.pop("tokens")
        self._loss = loss
        schedule = self._schedule(len(inputs), inputs[0]["tokens"].shape)
        schedule.step(
            *((tokens,) if self.pieces[0].first else ()), **joined, return_outputs=False,
            target=tokens if self.holds_last else None, losses=[] if self.holds_last else None,
        )

    @property
    def holds_last(self) -> bool:
        """Whether the losses come out on this rank."""
        return any(piece.norm is not None for piece in self.pieces)

    @property
    def copies(self) -> list[nn.Parameter]:
        """Parameters of this rank that the first stage's rank counts too."""
        return [] if self.tied is None or self.pieces[0].first else [self.tied]

    @torch.no_grad()
    def evaluate(self, inputs: Inputs) -> LossSums | None:
        """Run one micro-batch forward, stage after stage. -> its sums where the last stage is"""
        tokens, rest = inputs["tokens"], {name: value for name, value in inputs.items() if name != "tokens"}
        pp_rank, pp = self.group.rank(), self.parallel.pp
        for piece in self.pieces:
            received: tuple[Tensor, ...] = (tokens,)
            if not piece.first:
                received = self._features(tokens.shape, tokens.device)
                for tensor in received:
                    dist.recv(tensor, group=self.group, group_src=(pp_rank - 1) % pp)
            result: tuple[Tensor, ...] = piece(*received, **rest)
            if piece.norm is not None:
                return LossSums(*result)
            for tensor in result:
                dist.send(tensor.contiguous(), group=self.group, group_dst=(pp_rank + 1) % pp)
        return None

    def tie(self) -> None:
        """Add up the gradients of the embedding and of the head that is tied to it, where two ranks hold them."""
        weight = self.tied
        if weight is None:
            return
        assert weight.grad is not None
        local = local_tensor(weight.grad)
        theirs, last = torch.empty_like(local), self.parallel.pp - 1
        peer = dist.get_global_rank(self.group, last - self.group.rank())
        send = dist.P2POp(dist.isend, local.contiguous(), peer, self.group)
        receive = dist.P2POp(dist.irecv, theirs, peer, self.group)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()
        local += theirs

    def _schedule(self, num_passes: int, shape: torch.Size) -> ScheduleGPipe:
        key = (num_passes, shape)
        if key not in self._schedules:
            stages = [self._stage(*each, shape) for each in zip(self.pieces, self.mesh.stages, strict=True)]
            self._schedules[key] = SCHEDULES[self.parallel.pp_schedule](
                stages if self.parallel.pp_stages > self.parallel.pp else stages[0], num_passes,
                loss_fn=lambda output, target: self._loss(LossSums(*output)), scale_grads=False,
            )
        return self._schedules[key]

    def _stage(self, piece: LanguageModel, stage: int, shape: torch.Size) -> PipelineStage:
        meta = torch.device("meta")
        features = tuple(tensor.requires_grad_() for tensor in self._features(shape, meta))
        tokens = (torch.empty(shape, dtype=torch.int64, device=meta),)
        sums = (torch.empty((), device=meta),) * 4
        return PipelineStage(
            piece, stage, self.parallel.pp_stages, self.mesh.device, input_args=tokens if piece.first else features,
            output_args=features if piece.norm is None else sums, group=self.group,
        )

    def _features(self, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
        """Room for what a stage gives the next. shape: of tokens, [batch, seq]"""
        dtype = self.pieces[0].compute_dtype
        x = torch.empty(shape[0], shape[1] // self.mesh.sequence_size, self.d_model, dtype=dtype, device=device)
        return x, torch.empty(2, dtype=torch.promote_types(dtype, torch.float32), device=device)
