"""Quantization of experts."""

from typing import Literal

from pydantic import Field

from moe_dist.config.sections.base import Section


class PrecisionConfig(Section):
    """Storage format of clustered experts in exports and evaluation (moe.kind=clustered)."""

    residuals: Literal["none", "qat", "post", "packed"] = Field(
        "none",
        description="quantization of low-rank factors: none; post: after training, in evaluation and export; qat: "
        "fake-quantized in training's forward pass too; packed: kept so in training, without float32 masters, and "
        "rounded stochastically at each update",
    )
    bits: Literal[4, 8] = Field(4, description="bits per number of a factor")
    group_size: Literal[32, 64, 128] = Field(64, description="neighboring numbers along d or f that share a scale")
    symmetric: bool = Field(True, description="symmetric quantization, without zero points")
    scale_dtype: Literal["bfloat16", "float16"] = Field("bfloat16", description="type of the scales")
    bases: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="storage type of bases; null: train.precision"
    )
