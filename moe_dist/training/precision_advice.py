"""Warning of a precision that this processor has no instructions for, and agreement of the ranks on `auto`."""

import torch

from moe_dist.config import RunConfig
from moe_dist.distributed.agreement import differing_ranks
from moe_dist.distributed.init import RankInfo
from moe_dist.errors import ConfigError
from moe_dist.kernels.gemm_speed import relative_gemm_speed

SLOW = 0.8
"""Speed of products beside float32's below which a type is named slow."""


def precision_advice(config: RunConfig, device: torch.device) -> str | None:
    """Return a line with the measured ratio if products in `train.precision` are slower than in float32; else None."""
    precision = config.train.precision
    if precision == "float32":
        return None
    speed = relative_gemm_speed(getattr(torch, precision), device)
    if speed >= SLOW:
        return None
    return (
        f"products in train.precision={precision} are {1 / speed:.1f} times slower here than in float32: set it to "
        "float32 or auto"
    )


def check_same_precision(config: RunConfig, process: RankInfo) -> None:
    """Require one precision of all ranks; collective.

    Raises:
        ConfigError: the machines' processors resolve `auto` differently.
    """
    if different := differing_ranks(getattr(torch, config.train.precision).itemsize, process.device):
        raise ConfigError(
            f"train.precision=auto is {config.train.precision} on rank {process.rank}, but not the same on all ranks "
            f"(other than rank 0: {', '.join(map(str, different))}): set it to float32 or bfloat16"
        )
