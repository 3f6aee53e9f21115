"""The selective scan against its recurrence."""

from __future__ import annotations

import pytest
import torch

from moescale.ops.scan import selective_scan_reference
from moescale.ops.scan_triton import selective_scan
from tests.support.exact import check


@pytest.mark.parametrize(
    ("batch", "seq", "channels", "d_state", "documents", "dtype"),
    [(1, 1, 1, 1, False, torch.float32), (2, 19, 3, 4, True, torch.float32), (1, 33, 5, 3, False, torch.bfloat16)],
)
def test_scan(batch: int, seq: int, channels: int, d_state: int, documents: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(seq)
    positions = torch.arange(seq).repeat(batch, 1) % 7 if documents else None
    u, delta = torch.randn(batch, seq, channels), torch.rand(batch, seq, channels)
    a, d = -3 * torch.rand(channels, d_state), torch.randn(channels)
    b, c = torch.randn(batch, seq, d_state), torch.randn(batch, seq, d_state)
    inputs = [x.double() for x in (u, delta, a, b, c, d)]
    dtypes = [dtype, dtype, torch.float32, dtype, dtype, torch.float32]
    check(lambda *given: selective_scan(*given, positions), lambda *given: selective_scan_reference(*given, positions),
          inputs, dtypes)
