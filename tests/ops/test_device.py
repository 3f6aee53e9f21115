"""Memory of tensors that are gone is there for those of the next step."""

import subprocess
import sys

import pytest

PAGES = """
import resource, sys, torch
from moescale.ops.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()

def step():
    [torch.ones(size << 20) for size in (1, 2, 4) * 4]  # of 4 to 16 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before, after = step(), step()
print(after - before)
"""


def new_pages(how: str) -> int:
    """Count the pages that a second step takes from the system, where memory is `kept` or left to the C library."""
    done = subprocess.run([sys.executable, "-c", PAGES, how], capture_output=True, text=True, timeout=60, check=True)
    return int(done.stdout)


def test_a_step_takes_the_memory_of_the_one_before() -> None:
    left_to_the_library = new_pages("left")
    if left_to_the_library < 1000:
        pytest.skip("the C library keeps it anyway")
    assert new_pages("kept") < left_to_the_library / 20
