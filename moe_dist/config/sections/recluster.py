"""Re-clustering of experts."""

from typing import Annotated, Literal

from pydantic import Field

from moe_dist.config.sections.base import Decay, Fraction, Positive, Section


class ReclusterConfig(Section):
    """Schedule, similarity and limits of re-clustering during training (moe.kind=clustered).

    The similarity also clusters the experts at the end of a standard warm-up (moe.warmup_standard).
    """

    period: Positive | None = Field(None, description="T: steps between rounds; null: no re-clustering")
    start: Positive = Field(20, description="step of the first round")
    growth: Annotated[float, Field(ge=1)] = Field(2.0, description="ratio of each interval to the one before")
    stop: Positive | None = Field(None, description="last step with a round; null: no limit")
    transition: Literal["adopt", "refit"] = Field(
        "adopt", description="adopt: a moved expert uses its new cluster's base unchanged; refit: it gets new factors"
    )
    similarity: Literal["fused", "random"] = Field("fused", description="random: a control with random similarities")
    alpha: Fraction = Field(
        0.5,
        description="weight of the similarity of residuals against that of activations; after a warm-up: of "
        "weights, if moe.shared_init",
    )
    router_weight: Fraction = Field(0.0, description="weight of router embeddings within activation similarity")
    load_weight: Annotated[float, Field(ge=0)] = Field(0.0, description="penalty of unequal cluster loads")
    decay: Decay = Field(0.95, description="decay of activation averages per step")
    sketch_size: Positive = Field(64, description="rows and columns of the weight sketches that are compared")
    threshold: Annotated[float, Field(ge=0)] = Field(
        0.05,
        description="smallest gain of a moved expert's mean similarity to its cluster, in standard deviations "
        "of the similarity over pairs of experts",
    )
    max_moved: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25, description="largest share of the experts that one round moves"
    )
    max_loss_increase: Annotated[float, Field(ge=0)] = Field(
        0.002, description="relative increase of the loss above which moves are rejected"
    )
    guard_sequences: Positive = Field(1, description="sequences of each rank's next batch on which moves are tried")
    relocate: bool = Field(
        True, description="place clusters that tokens choose together on one rank (with several clusters per rank)"
    )
