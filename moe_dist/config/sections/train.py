"""The loop, and the optimizer in it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_dist.config.sections.base import Decay, Fraction, NonNegative, Positive, Section, require_divisible
from moe_dist.errors import ConfigError


class OptimizerConfig(Section):
    """AdamW; decay is off for norms, biases, vectors and embeddings."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    router_lr_scale: Annotated[float, Field(gt=0)] = Field(
        0.1, description="the routers' learning rate over that of all else: slow enough for balancing to follow"
    )
    feed_forward_lr_scale: Annotated[float, Field(gt=0)] = Field(
        1.0, description="the same of the feed-forward layers' full matrices: clusters' bases, standard experts, dense"
    )
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="largest global gradient norm; 0: no clipping")


class TrainConfig(Section):
    """The loop: how long, how much at a time, how precise, what is reported when."""

    steps: Positive = 400
    global_batch_size: Positive = Field(32, description="sequences a step, over all ranks")
    micro_batch_size: Positive | None = Field(None, description="sequences a rank holds at once; null: no accumulation")
    precision: Literal["float32", "bfloat16"] = Field("bfloat16", description="bfloat16 keeps float32 master weights")
    schedule: Literal["cosine", "wsd"] = Field("cosine", description="wsd: warm-up, stable, decay")
    warmup_steps: NonNegative = 20
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="share of the steps that decay (wsd)")
    final_lr_ratio: Fraction = Field(0.1, description="last learning rate over the highest")
    eval_every: NonNegative = Field(100, description="steps between evaluations; 0: only at the end")
    eval_sequences: Positive = Field(256, description="validation sequences an evaluation reads at most")
    log_every: Positive = 10

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ConfigError(f"train.warmup_steps={self.warmup_steps} must be less than train.steps={self.steps}")
        if self.micro_batch_size is not None:
            require_divisible(
                "train.global_batch_size", self.global_batch_size, "train.micro_batch_size", self.micro_batch_size
            )
        return self
