"""What experts are stored as."""

from typing import Literal

from pydantic import Field

from moe_dist.config.sections.base import Section


class PrecisionConfig(Section):
    """What clustered experts are stored as when they are not being updated (moe.kind=clustered)."""

    residuals: Literal["none", "qat", "post"] = Field(
        "none",
        description="factors in few bits: none; post: at the end, in evaluation and export; qat: the forward pass of "
        "training sees them so too",
    )
    bits: Literal[4, 8] = Field(4, description="of a factor's number")
    group_size: Literal[32, 64, 128] = Field(64, description="neighboring numbers along d or f that share a scale")
    symmetric: bool = Field(True, description="no zero points beside the scales")
    scale_dtype: Literal["bfloat16", "float16"] = Field("bfloat16", description="what scales are kept as")
    bases: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="what bases are stored as; null: train.precision"
    )
