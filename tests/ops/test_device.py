"""A process that is set up for training keeps the memory of a step for the next, and multiplies in float32."""

import subprocess
import sys

import pytest
import torch

from moescale.ops import device
from moescale.ops.product import by_onednn

PAGES = """
import resource, sys, torch
from moescale.ops.device import prepare_processor
if sys.argv[1] == "kept":
    prepare_processor()

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


def test_products_are_those_of_float32() -> None:
    device.prepare_processor()
    a, b = torch.randn(3, 200, 300), torch.randn(3, 300, 100)
    for product, exact in ((a @ b, a.double() @ b.double()), (a[0] @ b[0], a[0].double() @ b[0].double())):
        assert (product - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize(("allowed", "onednn"), [(1.0, True), (0.0, False)])
def test_onednn_multiplies_where_it_does_not_round(
    allowed: float, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a product is further from float64 than is allowed, MKL keeps them."""
    monkeypatch.setattr(device, "FLOAT32_ERROR", allowed)
    device._multiply_by_onednn()
    assert by_onednn(torch.ones(1)) == onednn
