"""Kernels in Triton's interpreter, which decides when they are imported: `tests/ops/test_triton.py` starts these."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*"]
