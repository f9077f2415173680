"""How ranks are laid out."""

from typing import Literal

from pydantic import Field, field_validator

from moe_dist.config.sections.base import NonNegative, Positive, Section
from moe_dist.errors import ConfigError


class WorldConfig(Section):
    """How ranks are laid out: world = data x cluster x shard (docs/architecture.md)."""

    data: Positive | None = Field(None, description="replicas of the same experts; null: what the ranks leave over")
    cluster: Positive | None = Field(None, description="blocks of clusters; null: as many as fit ranks and clusters")
    shard: Positive = Field(1, description="ranks that together hold one block of clusters")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    backend: Literal["auto", "gloo", "nccl"] = Field("auto", description="auto: nccl on CUDA, gloo on the CPU")
    timeout_seconds: Positive = Field(600, description="a collective that takes longer stops the run")
    threads: NonNegative = Field(0, description="CPU threads a rank; 0: the cores shared among the ranks of a node")

    @field_validator("zero_stage")
    @classmethod
    def _zero_3_refused(cls, value: int) -> int:
        if value == 3:
            raise ConfigError(
                "world.zero_stage=3 is not supported: with experts DeepSpeed's parameter hooks wait for those that got "
                "no token and hang (deepspeedai/DeepSpeed#2870); use 0, 1 or 2"
            )
        return value
