"""Training loop and optimizer."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from moe_dist.config import machine
from moe_dist.config.sections.base import Decay, Fraction, NonNegative, Positive, Section, require_divisible
from moe_dist.errors import ConfigError


class OptimizerConfig(Section):
    """AdamW, or Muon for matrices; no weight decay for norms, biases, vectors and embeddings."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="optimizer; muon: of matrices of attention, feed-forward layers, bases and standard experts, with "
        "AdamW for all other parameters",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-3, description="learning rate after the warm-up")
    trainable: Literal["all", "residuals"] = Field(
        "all",
        description="parameters that are trained: all, or experts' low-rank factors and vectors alone (clustered)",
    )
    router_lr_scale: Annotated[float, Field(gt=0)] = Field(
        0.1, description="factor on the routers' learning rate; balancing must keep up with them"
    )
    feed_forward_lr_scale: Annotated[float, Field(gt=0)] = Field(
        1.0, description="factor on the learning rate of full feed-forward matrices: bases, standard experts, dense"
    )
    beta1: Decay = Field(0.9, description="decay of the first moment")
    muon_momentum: Decay = Field(0.95, description="decay of Muon's momentum")
    beta2: Decay = Field(0.95, description="decay of the second moment")
    epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decoupled weight decay, of matrices only")
    clip_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="global gradient norm to clip to; 0: no clipping")


class TrainConfig(Section):
    """Length, batch size, precision, schedule and logging of training."""

    steps: Positive = Field(400, description="optimizer steps of the run")
    global_batch_size: Positive = Field(32, description="sequences per step, over all ranks")
    micro_batch_size: Positive | None = Field(
        None, description="sequences of a micro-batch per rank; null: no accumulation"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        validate_default=True,
        description="bfloat16 and float16 keep float32 master weights, float16 with dynamic loss scaling; auto: "
        "bfloat16 on a GPU or a CPU with instructions for it, else float32",
    )
    schedule: Literal["cosine", "wsd"] = Field("cosine", description="wsd: warm-up, stable, decay")
    warmup_steps: NonNegative = Field(20, description="steps of linear warm-up of the learning rate")
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="share of the steps in the decay phase (wsd)"
    )
    final_lr_ratio: Fraction = Field(0.1, description="final learning rate, as a share of the peak")
    eval_every: NonNegative = Field(100, description="steps between evaluations; 0: only at the end")
    eval_sequences: Positive = Field(256, description="limit of validation sequences per evaluation")
    log_every: Positive = Field(10, description="steps between lines of metrics")

    @field_validator("precision")
    @classmethod
    def _resolve_precision(cls, value: str) -> str:
        if value != "auto":
            return value
        return "bfloat16" if machine.has_bfloat16() else "float32"

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ConfigError(
                f"train.warmup_steps={self.warmup_steps} must be less than train.steps={self.steps}: set it to at most "
                f"{self.steps - 1}, or train longer"
            )
        if self.micro_batch_size is not None:
            require_divisible(
                "train.global_batch_size", self.global_batch_size, "train.micro_batch_size", self.micro_batch_size
            )
        return self

    def evaluates_after(self, step: int) -> bool:
        """Return True if the validation loss is evaluated after this step."""
        return step == self.steps or bool(self.eval_every and step % self.eval_every == 0)
