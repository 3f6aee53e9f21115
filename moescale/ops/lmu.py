"""The cell of the Legendre memory unit, whose hidden units and memories see each other (Voelker et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LmuWeights:
    """What the cell multiplies by, in at least float32.

    a: [order, order], b: [order], of a position. e_h: [memories, units]. e_m: [memories, memories * order].
    w_h: [units, units]. w_m: [units, memories * order].
    """

    a: Tensor
    b: Tensor
    e_h: Tensor
    e_m: Tensor
    w_h: Tensor
    w_m: Tensor


def lmu_cell(
    signal: Tensor, drive: Tensor, restarts: Tensor, weights: LmuWeights, hidden: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the cell position by position, by autograd alone.

    u_t = signal_t + e_h h_(t-1) + e_m m_(t-1);  m_t = A m_(t-1) + B u_t;  h_t = tanh(drive_t + w_h h_(t-1) + w_m m_t)
    signal: [batch, seq, memories]. drive: [batch, seq, units]. restarts: [batch, seq] bool, before which all is zero.
    hidden: [batch, units] and memory: [batch, memories, order], from before the first position.
    Returns h [batch, seq, units], and the last hidden units and memories.
    """
    from_hidden = torch.cat((weights.e_h, weights.w_h)).T  # both at once
    keep = (~restarts).to(hidden.dtype).unsqueeze(-1)
    outs = []
    for signal_t, drive_t, keep_t in zip(signal.unbind(1), drive.unbind(1), keep.unbind(1), strict=True):
        hidden, memory = hidden * keep_t, memory * keep_t.unsqueeze(-1)
        to_signal, to_units = (hidden @ from_hidden).split((signal.shape[2], drive.shape[2]), 1)
        u = signal_t + to_signal + memory.flatten(1) @ weights.e_m.T
        memory = memory @ weights.a.T + u.unsqueeze(2) * weights.b
        hidden = (drive_t + to_units + memory.flatten(1) @ weights.w_m.T).tanh()
        outs.append(hidden)
    return torch.stack(outs, 1), hidden, memory
