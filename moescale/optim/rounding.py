"""Stochastic rounding to bfloat16 whose draws belong to the elements of a weight: the same in every layout.

Rounded to nearest, a mean that moves by less than half of its last place stays where it is. bfloat16 has eight
significant bits, so a second moment, which falls by at most 1 - beta2 of itself a step, never falls where beta2 is
above 0.998, and stops at some numbers from 0.996 on. Rounded up with the probability of its distance from the number
below, a value is right in the mean (Gupta et al., 2015; for training in bfloat16, Zamirai et al., 2020).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from moescale.comm.collectives import local_part

LAST_BITS = 16  # of float32, that bfloat16 lacks
_MIX = ((16, 0x7FEB352D), (15, -2073254261))  # 0x846CA68B as a signed 32-bit number
_STEP = -1640531527  # 0x9E3779B9 likewise


class Draws:
    """Draws 32 bits for each element of this rank's part of a weight, a function of name, element and step alone.

    Elements are numbered in the whole weight; numbers and bits are int32, and wrap.
    """

    def __init__(self, name: str, weight: Tensor) -> None:
        """name: of the weight in the whole model. weight: plain, or a DTensor"""
        _, cut = local_part(weight)
        shape, device = list(weight.shape), weight.device
        if not shape:
            shape, cut = [1], [slice(0, 1)]
        numbers = torch.zeros((), dtype=torch.int64, device=device)
        for size, part in zip(shape[:-1], cut[:-1], strict=True):
            numbers = (numbers * size).unsqueeze(-1) + torch.arange(part.start, part.stop, device=device)
        salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True) >> 2
        self._rows = (numbers.flatten() * shape[-1] + salt).to(torch.int32)  # [rows]
        self._columns = torch.arange(cut[-1].start, cut[-1].stop, device=device, dtype=torch.int32)

    def firsts(self, step: Tensor) -> Tensor:
        """Number the first element of each row, mixed with the step: what native.cpp draws from. -> [rows] int32"""
        return self._rows + step.to(torch.int32) * _STEP + self._columns[0]

    def of(self, rows: slice, step: Tensor) -> Tensor:
        """Draw for some rows of the part, all dims but the last flattened. step: scalar. -> [rows, columns] int32"""
        bits = (self._rows[rows] + step.to(torch.int32) * _STEP).unsqueeze(-1) + self._columns
        for shift, factor in _MIX:
            bits.bitwise_xor_(_shifted(bits, shift)).mul_(factor)
        return bits.bitwise_xor_(_shifted(bits, 16))


def high_bits(draws: Tensor) -> Tensor:
    """Take the upper half of each draw, where the lower one was used already."""
    return _shifted(draws, LAST_BITS)


def store_rounded(to: Tensor, values: Tensor, draws: Tensor) -> None:
    """Round to one of the two nearest numbers of bfloat16, and store it; what is not finite becomes NaN.

    to: bfloat16. values: of the same shape. draws: int32, of which the last 16 bits count
    """
    values = values.float()
    bits = values.view(torch.int32) + (draws & ((1 << LAST_BITS) - 1))
    bits.bitwise_and_(-(1 << LAST_BITS))
    # the bits of a NaN may have wrapped; the difference is 0, or NaN where a value is not finite
    to.copy_(bits.view(torch.float32).add_(values - values))


def _shifted(bits: Tensor, shift: int) -> Tensor:
    """Shift to the right; the sign is not copied."""
    return (bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)
