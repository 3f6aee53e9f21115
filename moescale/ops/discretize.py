"""From a differential equation x' = A x + B u to a recurrence x_k = A_bar x_(k-1) + B_bar u_k."""

from __future__ import annotations

import torch
from torch import Tensor

ALPHAS = {"forward_euler": 0.0, "bilinear": 0.5, "backward_euler": 1.0}


def discretize(
    a: Tensor, b: Tensor, step: Tensor | float, method: str | float = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Return A_bar and B_bar for a step.

    a: [..., size, size]. b: [..., size]. step: a number, or [...] for one system each. method:
    `forward_euler`, `backward_euler`, `bilinear`; a number is the alpha of the generalised bilinear
    transform between them (0 = forward, 1 = backward Euler); `zero_order_hold` is exact for a u
    that is constant over each step. Returns [..., size, size] and [..., size], in the dtype of a,
    with gradients to a, b and step. Raises ValueError for an unknown method.
    """
    step = torch.as_tensor(step, dtype=a.dtype, device=a.device)
    matrix_step, vector_step = step[..., None, None], step[..., None]
    if method == "zero_order_hold":
        # The exponential of the stacked [[A, B], [0, 0]] holds both, without an inverse of A.
        size = a.shape[-1]
        stacked = torch.cat((matrix_step * a, (vector_step * b).unsqueeze(-1)), -1)
        exponential = torch.linalg.matrix_exp(torch.nn.functional.pad(stacked, (0, 0, 0, 1)))
        return exponential[..., :size, :size], exponential[..., :size, size]
    if isinstance(method, str) and method not in ALPHAS:
        known = ", ".join((*ALPHAS, "zero_order_hold"))
        raise ValueError(f"method={method!r} is unknown: use {known}, or a number from 0 to 1")
    alpha = ALPHAS[method] if isinstance(method, str) else method
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    forward = identity + (1 - alpha) * matrix_step * a
    right = torch.cat((forward, (vector_step * b).unsqueeze(-1)), -1)
    solved = torch.linalg.solve(identity - alpha * matrix_step * a, right) if alpha else right
    return solved[..., :-1], solved[..., -1]
