"""Outputs and every gradient of a kernel, against a reference in float64 over the same, rounded values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def check(
    ours: Callable[..., Tensor | tuple[Tensor, ...]], exact: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype],
) -> None:
    """Call both with these inputs, all of which want gradients; `dtypes` are those that our side gets them in."""
    inputs = [tensor.to(dtype) for tensor, dtype in zip(inputs, dtypes, strict=True)]
    results: list[list[Tensor]] = []
    for function, wide in ((ours, False), (exact, True)):
        given = [x.double().requires_grad_() if wide else x.clone().requires_grad_() for x in inputs]
        out = function(*given)
        outs = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(0)
        grads = [torch.randn(x.shape, dtype=torch.float64).to(dtypes[0]).to(x.dtype) for x in outs]
        results.append([*outs, *torch.autograd.grad(outs, given, grads)])
    scale = max((_size(x) for x in results[1][: len(outs)] if x.numel()), default=0)
    for index, (own, other) in enumerate(zip(*results, strict=True)):
        assert own.shape == other.shape
        assert index < len(outs) or own.dtype == dtypes[index - len(outs)]
        if own.numel():
            assert own.isfinite().all()
            # a gradient that ought to be nothing, as of a softmax over one score, is measured by the outputs
            error = _size(own.double() - other) / max(_size(other), scale, 1e-30)
            assert error < TOLERANCE[dtypes[0]], f"result {index}: {error:.1e}"


def _size(tensor: Tensor) -> float:
    """The root of the mean square, as errors are measured everywhere here: one number that cancels out says little."""
    return float(tensor.detach().double().square().mean().sqrt())
