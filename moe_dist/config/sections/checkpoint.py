"""Checkpoints and resuming."""

from typing import Annotated

from pydantic import Field

from moe_dist.config.sections.base import NonNegative, PathText, Positive, Section

RESUME_WORDS = ("none", "auto", "requeued")
"""Values of `checkpoint.resume` that are no path."""


class CheckpointConfig(Section):
    """Checkpoints of a run, and the checkpoint to resume from (docs/checkpoints.md)."""

    every: NonNegative = Field(500, description="steps between checkpoints; 0: only when a stop is requested")
    keep_last: Positive = Field(2, description="number of newest checkpoints to keep; older ones are deleted")
    keep_every: NonNegative = Field(0, description="keep every checkpoint whose step this divides; 0: none")
    asynchronous: bool = Field(True, description="continue training while a checkpoint is written")
    save_final: bool = Field(True, description="save the final weights, for evaluation and export")
    init: PathText | None = Field(
        None,
        description="folder of a run or a checkpoint whose weights a new run starts from; null: random weights",
    )
    resume: Annotated[PathText, Field(min_length=1)] = Field(
        "requeued",
        description="none; auto: of the runs of this name with steps left the one that got furthest, from its newest "
        "valid checkpoint; requeued: the newest of a job that was restarted, else none; or a path: of a run, which is "
        "continued, or of a checkpoint, from which a new run branches off",
    )
