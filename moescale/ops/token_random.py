"""Random numbers that belong to tokens, not to ranks: the same token draws the same number in every layout."""

from __future__ import annotations

import torch
from torch import Tensor

_INCREMENT = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_SALT = 0x632BE59BD9B4E019  # odd and far from the increment: streams of different salts do not meet
_MIX = ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1))


def uniform(token_id: Tensor, salt: int) -> Tensor:
    """Draw one number in [0, 1) per token, a pure function of its token id and the salt (SplitMix64).

    token_id: [...] int64. salt: differs between runs, layers and purposes. -> [...] float32
    """
    offset = (salt * _SALT + 2**63) % 2**64 - 2**63  # wrapped to a signed 64-bit number
    bits = (token_id + offset) * _INCREMENT
    for shift, factor in _MIX:
        bits = (bits ^ (bits >> shift & (1 << (64 - shift)) - 1)) * factor  # a logical shift: the sign is not copied
    return (bits >> 40 & 0xFFFFFF).to(torch.float32) / 0x1000000


def uniform_features(token_id: Tensor, salt: int, num_features: int) -> Tensor:
    """Draw `num_features` numbers in [0, 1) per token.

    token_id: [...] int64. salt: as in `uniform`. -> [..., num_features] float32
    """
    feature = torch.arange(num_features, device=token_id.device)
    return uniform(token_id.unsqueeze(-1) * num_features + feature, salt)
