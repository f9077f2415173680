"""What is kept of a run."""

from typing import Annotated

from pydantic import Field

from moe_dist.config.sections.base import NonNegative, Positive, Section


class CheckpointConfig(Section):
    """What is kept of a run, and from where it goes on (docs/checkpoints.md)."""

    every: NonNegative = Field(500, description="steps between checkpoints; 0: only where a stop is requested")
    keep_last: Positive = Field(2, description="newest checkpoints kept; older ones are deleted")
    keep_every: NonNegative = Field(0, description="a checkpoint whose step this divides is never deleted; 0: none")
    asynchronous: bool = Field(True, description="training goes on while a checkpoint is written")
    save_final: bool = Field(True, description="keep the trained weights at the end, for evaluation and export")
    resume: Annotated[str, Field(min_length=1)] = Field(
        "requeued",
        description="none; auto: the newest good checkpoint of the newest run of this name; requeued: as auto, in a "
        "job that was started again, else none; or a path: of a run, which goes on, or of a checkpoint, from which a "
        "new run branches off",
    )
