"""Share of a device's peak that a token takes: the factor from tokens/s to model FLOPs utilization (MFU)."""

import torch

from moe_dist.config import RunConfig
from moe_dist.config.device_peaks import peak_flops
from moe_dist.config.token_work import work_of
from moe_dist.errors import ConfigError

PASSES = 3
"""FLOPs of forward and backward pass, as a multiple of the forward pass."""


def flops_share(config: RunConfig, vocabulary: int, device: torch.device) -> float | None:
    """Return the FLOPs of a token over the device's peak a second; None: the peak or the work is not known."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if peak is None else share_of_peak(config, vocabulary, peak)


def share_of_peak(config: RunConfig, vocabulary: int, peak: float) -> float | None:
    """Return the FLOPs of a token over a peak a second; None: the model's work is not known."""
    try:
        return PASSES * work_of(config, vocabulary).token(config.model.layers) / peak
    except ConfigError:
        return None
