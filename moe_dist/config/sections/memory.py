"""Where experts are that a device cannot hold."""

from typing import Annotated

from pydantic import Field

from moe_dist.config.sections.base import NonNegative, Section

LARGEST = 10**18
"""Bytes that a budget may name: more than any machine has, and few enough to be counted in 64 bits."""


class MemoryConfig(Section):
    """Experts whose weights, gradients and training state are more than a device holds (moe.kind=clustered)."""

    offload: bool = Field(False, description="clusters of experts live below the device and come to it for use")
    device_budget: Annotated[float, Field(gt=0, le=LARGEST)] = Field(
        1.0,
        description="of a device's memory for experts: bytes; or, up to 16, in parts of what weights, gradients and "
        "training state of the dense baseline's feed-forward layers take",
    )
    host_budget: Annotated[int, Field(ge=1, le=LARGEST)] | None = Field(
        None, description="bytes of host memory between an accelerator and the disk; null: no limit. Unused on a CPU"
    )
    directory: str | None = Field(
        None, description="where the disk tier is, best on a local disk; null: .offload/<name> in runs_dir"
    )
    prefetch: NonNegative = Field(2, description="clusters that are fetched ahead of the one in use")
