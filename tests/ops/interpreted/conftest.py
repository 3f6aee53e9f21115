"""Kernels in Triton's interpreter, which decides when they are imported: `tests/ops/test_triton.py` starts these."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*"]


@pytest.fixture(autouse=True)
def no_number_where_none_was_written() -> Iterator[None]:
    """Let torch fill the memory of new tensors with NaN, in which what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
