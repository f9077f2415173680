"""Layout of ranks."""

from typing import Literal

from pydantic import Field, field_validator

from moe_dist.config.sections.base import NonNegative, Positive, Section
from moe_dist.errors import ConfigError


class WorldConfig(Section):
    """Layout of ranks: pipeline stages of data x cluster x shard for experts, groups x context x tensor for attention.

    See docs/architecture.md.
    """

    data: Positive | None = Field(
        None, description="replicas of the same experts; null: ranks / (pipeline x cluster x shard)"
    )
    cluster: Positive | None = Field(
        None, description="blocks of clusters; null: the largest number that divides ranks and clusters"
    )
    shard: Positive = Field(1, description="neighboring ranks that share one block of clusters")
    shard_mode: Literal["replicate", "experts", "slice"] = Field(
        "replicate",
        description="ranks of a block. replicate: each holds all its experts, and rows stay where they are received; "
        "experts: residuals are divided among them, and rows are exchanged (stage two); slice: experts and their bases "
        "are divided along the hidden width, and all ranks of the block compute every row",
    )
    tensor: Positive = Field(
        1,
        description="neighboring ranks that divide attention heads, embedding and output layer (tensor parallelism); "
        "between these, tokens of a sequence are divided among them (sequence parallelism)",
    )
    context: Positive = Field(
        1, description="parts into which sequences are divided for attention too (context parallelism, Ulysses)"
    )
    pipeline: Positive = Field(
        1, description="stages into which the layers are divided (pipeline parallelism); the outermost axis of ranks"
    )
    virtual_pipeline: Positive = Field(
        1, description="runs of layers of each stage, which are interleaved with those of the other stages"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage", json_schema_extra={"enum": [0, 1, 2]}
    )
    backend: Literal["auto", "gloo", "nccl"] = Field("auto", description="auto: nccl on CUDA, gloo on the CPU")
    timeout_seconds: Positive = Field(600, description="timeout of collectives, seconds; exceeding it stops the run")
    threads: NonNegative = Field(0, description="CPU threads per rank; 0: the cores of a node divided by its ranks")

    @field_validator("zero_stage")
    @classmethod
    def _reject_zero_3(cls, value: int) -> int:
        if value == 3:
            raise ConfigError(
                "world.zero_stage=3 is not supported: with experts DeepSpeed's parameter hooks hang on those without "
                "tokens (deepspeedai/DeepSpeed#2870); use 0, 1 or 2"
            )
        return value
