"""Speed of matrix products by type, to warn of types for which a processor has no instructions."""

import time

import torch

_SIZE, _ROUNDS = 256, 5


def relative_gemm_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Return the speed of a 256 x 256 product in `dtype`, as a multiple of float32's on the same device."""
    seconds = {kind: _gemm_seconds(kind, device) for kind in (torch.float32, dtype)}
    return seconds[torch.float32] / seconds[dtype]


def _gemm_seconds(dtype: torch.dtype, device: torch.device) -> float:
    a = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    taken = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        taken.append(time.perf_counter() - started)
    return min(taken)
