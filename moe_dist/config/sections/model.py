"""Transformer around the MoE layers."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_dist.config.sections.base import Positive, Section, require_divisible
from moe_dist.errors import ConfigError


class RopeScaling(Section):
    """Stretching of rotary positions beyond the length that a model was first trained with."""

    kind: Literal["linear", "llama3"]
    factor: Annotated[float, Field(ge=1)] = Field(description="factor by which wavelengths grow")
    low_frequency_factor: Annotated[float, Field(gt=0)] = Field(
        1.0, description="wavelengths above original_length / this are stretched in full (llama3)"
    )
    high_frequency_factor: Annotated[float, Field(gt=0)] = Field(
        4.0, description="wavelengths below original_length / this are kept (llama3)"
    )
    original_length: Positive = Field(8192, description="tokens per sequence of the first training (llama3)")


class ModelConfig(Section):
    """Transformer around the MoE layers, the same for every `moe.kind`."""

    layers: Positive = Field(2, description="transformer layers")
    hidden_size: Positive = Field(128, description="d: width of the residual stream")
    heads: Positive = Field(4, description="heads of attention")
    kv_heads: Positive | None = Field(
        None, description="key/value heads (grouped-query attention); null: as many as heads"
    )
    head_dim: Positive | None = Field(None, description="width of a head; null: hidden_size / heads")
    qkv_bias: bool = Field(False, description="biases of the query, key and value projections")
    qk_norm: Literal["none", "head", "width"] = Field(
        "none", description="RMSNorm of queries and keys: of each head, or of all heads together"
    )
    sequence_length: Positive = Field(256, description="tokens per sequence")
    tie_embeddings: bool = Field(True, description="share the token embedding's weights with the output layer")
    rope_base: Positive = Field(10000, description="base of the rotary positions' frequencies")
    rope_scaling: RopeScaling | None = Field(None, description="stretching of rotary positions; null: none")
    norm_epsilon: Annotated[float, Field(gt=0)] = Field(1e-5, description="epsilon of all RMSNorms")
    init_std: Annotated[float, Field(gt=0)] = Field(
        0.02,
        description="std of initial weights; over sqrt(2 layers) for those that add to the residual stream",
    )
    activation_checkpointing: bool = Field(False, description="recompute each layer in the backward pass")

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_size // self.heads

    @property
    def output_init_std(self) -> float:
        """Initial std of layers that add to the residual stream: init_std / sqrt(2 layers), as in GPT-2."""
        return self.init_std / math.sqrt(2 * self.layers)

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.head_dim is None:
            require_divisible("model.hidden_size", self.hidden_size, "model.heads", self.heads)
        if self.kv_heads is not None:
            require_divisible("model.heads", self.heads, "model.kv_heads", self.kv_heads)
        if self.head_dim is not None and self.head_dim % 2:
            raise ConfigError(f"model.head_dim={self.head_dim} is odd: rotary positions need an even head size")
        if self.head_width % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} / model.heads={self.heads} is odd: rotary positions need "
                "an even head size"
            )
        return self
