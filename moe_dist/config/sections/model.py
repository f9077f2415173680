"""Transformer around the MoE layers."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_dist.config.sections.base import NonNegative, Positive, Section, require_divisible
from moe_dist.errors import ConfigError


class RopeScaling(Section):
    """Stretching of rotary positions beyond the length that a model was first trained with."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: Annotated[float, Field(ge=1)] = Field(description="factor by which wavelengths grow")
    low_frequency_factor: Annotated[float, Field(gt=0)] = Field(
        1.0, description="wavelengths above original_length / this are stretched in full (llama3)"
    )
    high_frequency_factor: Annotated[float, Field(gt=0)] = Field(
        4.0, description="wavelengths below original_length / this are kept (llama3)"
    )
    original_length: Positive = Field(8192, description="tokens per sequence of the first training (llama3, yarn)")
    fast_rotations: Annotated[float, Field(gt=0)] = Field(
        32.0, description="wavelengths with more rotations over original_length are kept (yarn)"
    )
    slow_rotations: Annotated[float, Field(gt=0)] = Field(
        1.0, description="wavelengths with fewer rotations over original_length are stretched in full (yarn)"
    )
    mscale: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of log(factor) in rotated parts (yarn)")
    mscale_all_dim: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of log(factor) in the scale of all logits (yarn, latent attention); 0: none"
    )

    @property
    def rotation_scale(self) -> float:
        """Factor of rotated queries and keys (YaRN, arXiv 2309.00071); 1 for other kinds."""
        if self.kind != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return self._log_scale(self.mscale) / self._log_scale(self.mscale_all_dim)
        return self._log_scale(1.0)

    def _log_scale(self, weight: float) -> float:
        return 1.0 + 0.1 * weight * math.log(self.factor)


class LatentAttention(Section):
    """Multi-head latent attention (DeepSeek-V2): queries, keys and values are projected from low-rank latents."""

    query_rank: Positive | None = Field(None, description="width of the queries' latent; null: none")
    kv_rank: Positive = Field(512, description="width of the latent of keys and values")
    plain_dim: Positive = Field(128, description="width of a head's query and key without positions")
    rotary_dim: Positive = Field(64, description="width of a head's query, and of the one key, with rotary positions")
    value_dim: Positive = Field(128, description="width of a head's value")


class ModelConfig(Section):
    """Transformer around the MoE layers, the same for every `moe.kind`."""

    layers: Positive = Field(2, description="transformer layers")
    hidden_size: Positive = Field(128, description="d: width of the residual stream")
    heads: Positive = Field(4, description="heads of attention")
    kv_heads: Positive | None = Field(
        None, description="key/value heads (grouped-query attention); null: as many as heads"
    )
    head_dim: Positive | None = Field(None, description="width of a head; null: hidden_size / heads")
    latent: LatentAttention | None = Field(None, description="multi-head latent attention; null: plain attention")
    qkv_bias: bool = Field(False, description="biases of the query, key and value projections")
    qk_norm: Literal["none", "head", "width"] = Field(
        "none", description="RMSNorm of queries and keys: of each head, or of all heads together"
    )
    window: Positive | None = Field(
        None, description="sliding window: tokens that a token attends to, itself included; null: all earlier ones"
    )
    window_from: NonNegative = Field(0, description="first layer with the sliding window")
    attention: Literal["sdpa", "flex"] = Field(
        "sdpa",
        description="sdpa: torch's scaled_dot_product_attention, with a mask in memory for documents and windows; "
        "flex: FlexAttention, which skips what they hide (training on GPUs only)",
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

    def window_of(self, layer: int) -> int | None:
        """Return the sliding window of a layer, counted from 0; None: a token attends to all earlier ones."""
        return self.window if layer >= self.window_from else None

    @property
    def rotary_width(self) -> int:
        """Width of the part of a head that has rotary positions."""
        return self.head_width if self.latent is None else self.latent.rotary_dim

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.window_from and (self.window is None or self.window_from >= self.layers):
            raise ConfigError(
                f"model.window_from={self.window_from} needs model.window, and must be < model.layers={self.layers}"
            )
        return self

    @model_validator(mode="after")
    def _check_latent(self) -> Self:
        if self.latent is None:
            return self
        if self.latent.rotary_dim % 2:
            raise ConfigError(f"model.latent.rotary_dim={self.latent.rotary_dim} is odd: must be even")
        plain = {"window": None, "kv_heads": None, "head_dim": None, "qkv_bias": False, "qk_norm": "none"}
        for key, value in {**plain, "attention": "sdpa"}.items():
            if getattr(self, key) != value:
                raise ConfigError(f"model.{key}={getattr(self, key)} does not work with model.latent: leave it out")
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.latent is not None:
            return self
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
