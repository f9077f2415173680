"""Offload of experts that exceed the device's memory."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from moe_dist.config.sections.base import ByteCount, NonNegative, PathText, Section
from moe_dist.errors import ConfigError

WHOLE_DENSE_BASELINE = 1.0
LARGEST_RATIO = 1e6


class MemoryConfig(Section):
    """Offload of experts' weights, gradients and optimizer state to host memory and disk (moe.kind=clustered).

    The device budget is `device_budget_bytes` if it is set, else `device_budget_ratio`.
    """

    offload: bool = Field(False, description="keep clusters in lower memory tiers and load them for use")
    device_budget_bytes: ByteCount | None = Field(
        None, description="device memory for experts, bytes per rank; null: device_budget_ratio"
    )
    device_budget_ratio: Annotated[float, Field(gt=0, le=LARGEST_RATIO)] = Field(
        WHOLE_DENSE_BASELINE,
        description="device memory for experts, as a multiple of the dense baseline's feed-forward training state "
        "(weights, gradients, optimizer state)",
    )
    host_budget: ByteCount | None = Field(
        None, description="host memory for experts below an accelerator, bytes; null: no limit. Unused on a CPU"
    )
    directory: PathText | None = Field(
        None, description="directory of the disk tier, best on a local disk; null: .offload/<name> in runs_dir"
    )
    prefetch: NonNegative = Field(2, description="number of clusters to prefetch")
    lazy_updates: bool = Field(
        True, description="defer the updates of clusters without tokens until they are needed; bit-identical"
    )

    @model_validator(mode="after")
    def _require_one_budget(self) -> Self:
        # the default ratio beside bytes is no contradiction: a dumped configuration holds both keys
        if self.device_budget_bytes is not None and self.device_budget_ratio != WHOLE_DENSE_BASELINE:
            raise ConfigError(
                f"memory.device_budget_bytes={self.device_budget_bytes} and "
                f"memory.device_budget_ratio={self.device_budget_ratio:g} are both set: set the first to null, or the "
                f"second to {WHOLE_DENSE_BASELINE:g}"
            )
        return self
