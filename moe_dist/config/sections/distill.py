"""Training against the predictions of another model."""

from typing import Annotated

from pydantic import Field

from moe_dist.config.sections.base import Fraction, NonNegative, PathText, Section


class DistillConfig(Section):
    """Teacher whose next-token distributions a run is trained on, such as the model that it was compressed from."""

    teacher: PathText | None = Field(
        None,
        description="folder of a run or a checkpoint, whose predictions are computed in each step, or of predictions "
        "that `moe-dist store-logits` has written; null: train on the text alone",
    )
    weight: Fraction = Field(
        0.5, description="share of the divergence from the teacher in the loss; the rest is the loss of the text"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="temperature of both distributions; the divergence is multiplied by its square"
    )
    router_steps: NonNegative = Field(
        0,
        description="steps at the start that update routers alone; other weights keep their bits (with a teacher)",
    )
