"""Transformer around the MoE layers."""

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from moe_dist.config.sections.base import Positive, Section, require_divisible
from moe_dist.errors import ConfigError


class ModelConfig(Section):
    """Transformer around the MoE layers, the same for every `moe.kind`."""

    layers: Positive = 2
    hidden_size: Positive = 128
    heads: Positive = 4
    kv_heads: Positive | None = Field(
        None, description="key/value heads (grouped-query attention); null: as many as heads"
    )
    sequence_length: Positive = Field(256, description="tokens per sequence")
    tie_embeddings: bool = Field(True, description="share the token embedding's weights with the output layer")
    rope_base: Positive = 10000
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    init_std: Annotated[float, Field(gt=0)] = 0.02
    activation_checkpointing: bool = Field(False, description="recompute each layer in the backward pass")

    @property
    def output_init_std(self) -> float:
        """Initial std of layers that add to the residual stream: init_std / sqrt(2 layers), as in GPT-2."""
        return self.init_std / math.sqrt(2 * self.layers)

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        require_divisible("model.hidden_size", self.hidden_size, "model.heads", self.heads)
        if self.kv_heads is not None:
            require_divisible("model.heads", self.heads, "model.kv_heads", self.kv_heads)
        if (self.hidden_size // self.heads) % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} / model.heads={self.heads} is odd: rotary positions need "
                "an even head size"
            )
        return self
