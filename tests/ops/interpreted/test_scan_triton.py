"""The selective scan against its recurrence."""

from __future__ import annotations

import pytest
import torch

from moescale.ops.scan import selective_scan_reference
from moescale.ops.scan_triton import selective_scan
from tests.support.exact import check


@pytest.mark.parametrize(
    ("batch", "seq", "channels", "d_state", "goes_on", "dtype"),
    [(1, 1, 1, 1, False, torch.float32), (2, 19, 3, 4, True, torch.float32), (1, 33, 5, 3, False, torch.bfloat16),
     (1, 16, 2, 2, True, torch.bfloat16)],
)
def test_scan(batch: int, seq: int, channels: int, d_state: int, goes_on: bool, dtype: torch.dtype) -> None:
    """goes_on: from a state, and through several documents."""
    torch.manual_seed(seq)
    restarts = torch.arange(seq).repeat(batch, 1) % 7 == 5 if goes_on else None
    u, delta = torch.randn(batch, seq, channels), torch.rand(batch, seq, channels)
    a, d = -3 * torch.rand(channels, d_state), torch.randn(channels)
    b, c = torch.randn(batch, seq, d_state), torch.randn(batch, seq, d_state)
    first = torch.randn(batch, channels, d_state)
    inputs = [x.double() for x in (u, delta, a, b, c, d, *([first] if goes_on else []))]
    dtypes = [dtype, dtype, torch.float32, dtype, dtype, torch.float32, torch.float32][: len(inputs)]
    check(lambda *given: selective_scan(*given[:6], restarts, *given[6:]),
          lambda *given: selective_scan_reference(*given[:6], restarts, *given[6:]), inputs, dtypes)
