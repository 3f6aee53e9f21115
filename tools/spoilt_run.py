#!/usr/bin/env python
"""Trains like `python -m moescale`, but a gradient is no number in every 25th step of the small run.

torchrun starts this in place of Python where PYTHON_EXEC names it. A step is told by the numbers of its tokens, so that
one which is computed again after a restart is spoilt again: a run that leaves such updates out
(spikes.not_finite=skip) ends with the same weights however often it was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from unittest import mock

import torch.distributed as dist
from small_run import SPOILT_EVERY

from moescale.cli import main
from moescale.comm.collectives import local_tensor
from moescale.data.batches import Batch
from moescale.engine.base import StepLosses
from moescale.engine.native import NativeEngine

pure = NativeEngine.forward_backward


def forward_backward(self: NativeEngine, batches: Sequence[Batch], *, watch: bool = True) -> StepLosses:
    """Compute as ever, then spoil one number of one gradient, on the last rank."""
    losses = pure(self, batches, watch=watch)
    data = self.config.data
    step = 1 + int(batches[0].token_id.max()) // (data.global_batch * data.seq_len)
    if step % SPOILT_EVERY == 0 and dist.get_rank() == dist.get_world_size() - 1:
        gradient = next(weight.grad for weight in self.model.parameters() if weight.grad is not None)
        local_tensor(gradient).view(-1)[:1] = float("nan")
    return losses


if __name__ == "__main__":
    sys.argv[1:] = sys.argv[sys.argv.index("moescale") + 1:]  # of: -u -m moescale train ...
    with mock.patch.object(NativeEngine, "forward_backward", forward_backward):
        main()
