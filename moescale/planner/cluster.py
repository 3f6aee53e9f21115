"""What machines can do, by the makers' data sheets."""

from __future__ import annotations

PEAK_BFLOAT16_FLOPS = {  # dense tensor-core products a second; the first name that the device's name contains
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device_name: str, compute: str) -> float | None:
    """Look up the peak of one device; None where it is not known (processors, float32).

    device_name: as torch.cuda.get_device_name gives it. compute: as in `precision.compute`.
    """
    if compute != "bfloat16":
        return None
    return next((flops for name, flops in PEAK_BFLOAT16_FLOPS.items() if name in device_name), None)
