"""Multi-head latent attention by Megatron-core's layers, with rotary positions and norms on any device.

Megatron-core creates rotary positions on the current CUDA device; they are replaced after the model is built.
"""

from typing import Any

from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.model.megatron_attention import RotaryOnDevice

NORM_EPSILON = 1e-6
"""Epsilon of the latents' norms, which DeepSeek's models do not configure."""


class LatentNorm(nn.RMSNorm):
    """RMSNorm of a latent."""

    def __init__(self, config: MLATransformerConfig, hidden_size: int, **_: Any) -> None:
        super().__init__(hidden_size, eps=NORM_EPSILON)


class LatentRotary(RotaryOnDevice):
    """Rotary positions of latent attention, which takes their scale beside their angles."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self._scale = 1.0 if model.rope_scaling is None else model.rope_scaling.rotation_scale

    def forward(self, max_seq_len: int, *_: Any, **__: Any) -> tuple[Tensor, float]:
        """Return the angles of `max_seq_len` positions, and the factor of rotated queries and keys."""
        return self.get_emb(max_seq_len), self._scale


def install_stand_in() -> None:
    """Make Megatron-core's latent attention work in this process without Transformer Engine.

    Megatron-core 0.16 takes Transformer Engine for present, and then compares with what stands in for its classes.
    """
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False


def latent_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of Megatron-core's configuration for `model.latent`."""
    latent, scaling = model.latent, model.rope_scaling
    assert latent is not None
    return {
        "multi_latent_attention": True,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.plain_dim,
        "qk_pos_emb_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        "rope_type": "yarn",  # whose rotary positions have a scale
        "rotary_base": model.rope_base,
        "rotary_scaling_factor": 1.0 if scaling is None else scaling.factor,
        "mscale_all_dim": 0.0 if scaling is None else scaling.mscale_all_dim,
    }


def replace_rotary(gpt: Any, model: ModelConfig) -> None:
    """Give every layer our rotary positions."""
    for layer in gpt.decoder.layers.children():
        layer.self_attention.rotary_pos_emb = LatentRotary(model)
