"""Triton kernels without a GPU: run in the interpreter, and compiled for a GPU that is not there.

Both read the environment or patch the compiler, and neither can share its process with the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent


def run(*command: str, **environment: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


@pytest.mark.timeout(900)  # thirty seconds of one core, if it is not shared
def test_kernels_in_the_interpreter() -> None:
    run("-m", "pytest", "-x", "tests/ops/interpreted", TRITON_INTERPRET="1")


def test_some_kernels_compile_without_spilling() -> None:
    run("tools/compile_kernels.py", "--case", "causal, head_dim 128, bfloat16")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kernel_compiles_without_spilling() -> None:
    run("tools/compile_kernels.py")
