"""When and how experts are regrouped."""

from typing import Annotated, Literal

from pydantic import Field

from moe_dist.config.sections.base import Decay, Fraction, Positive, Section


class ReclusterConfig(Section):
    """Regrouping of experts during training (moe.kind=clustered): when, by what, and how much at a time.

    What experts are compared by holds for the end of a standard warm-up too (moe.warmup_standard).
    """

    period: Positive | None = Field(None, description="T: steps between rounds; null: clusters stay as they start")
    start: Positive = Field(20, description="step after which the first round comes")
    growth: Annotated[float, Field(ge=1)] = Field(2.0, description="each interval over the one before")
    stop: Positive | None = Field(None, description="step after which the structure is frozen; null: never")
    transition: Literal["adopt", "refit"] = Field(
        "adopt", description="a mover takes its new cluster's base as it is, or keeps its weights by new factors"
    )
    similarity: Literal["fused", "random"] = Field("fused", description="random: a control that regroups by chance")
    alpha: Fraction = Field(0.5, description="weight of the experts' parameters against what they are given")
    parameters: Literal["effective", "residual"] = Field(
        "residual", description="what of the parameters is compared: base + residual, or what an expert takes along"
    )
    router_weight: Fraction = Field(0.0, description="weight of router embeddings within what experts are given")
    load_weight: Annotated[float, Field(ge=0)] = Field(0.0, description="price of unequal loads of clusters")
    decay: Decay = Field(0.95, description="of the moving averages of what experts are given, a step")
    sketch_size: Positive = Field(64, description="rows and columns of the sketches that weights are compared by")
    threshold: Annotated[float, Field(ge=0)] = Field(
        0.02, description="least rise of a mover's mean similarity to its cluster, on the scale of a cosine"
    )
    max_moved: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25, description="share of the experts a round moves at most"
    )
    max_loss_increase: Annotated[float, Field(ge=0)] = Field(
        0.002, description="moves that would raise the loss by a larger share are dropped"
    )
    guard_sequences: Positive = Field(1, description="sequences of a rank's next batch on which moves are tried")
    relocate: bool = Field(
        True, description="clusters that tokens choose together go to one rank (where it holds several)"
    )
