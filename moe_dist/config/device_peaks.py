"""Peak speeds of devices: dense 16-bit matrix FLOP/s, as the vendors state them."""

PEAK_FLOPS = {
    "v100": 125e12,
    "a100": 312e12,
    "h100": 989e12,
    "h200": 989e12,
    "b200": 2250e12,
    "mi300x": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return the peak of a device by a name such as `NVIDIA H100 80GB HBM3`; None: it is not known."""
    words = device_name.lower().replace("-", " ").split()
    return next((peak for name, peak in PEAK_FLOPS.items() if name in words), None)
