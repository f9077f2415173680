"""Families of published models that can be imported and exported, each with its keys of config.json.

A family is what one class of transformers computes. What our configuration expresses and no class does is exported with
our own class (`modeling_moe_dist.py`).
"""

from collections.abc import Mapping
from typing import Any

from moe_dist.config import RunConfig
from moe_dist.errors import ConfigError
from moe_dist.integrations.huggingface.deepseek_family import DeepSeekFamily
from moe_dist.integrations.huggingface.family import PROJECTIONS, ExpertNames, Family

OUR_ARCHITECTURE = "MoeDistForCausalLM"
OUR_MODEL_TYPE = "moe_dist"


_NO_BIASES = {"attention_bias": False, "mlp_bias": False}
_EVERY_LAYER = {"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []}

FAMILIES = (
    Family("LlamaForCausalLM", "llama", fixed=_NO_BIASES),
    Family("MistralForCausalLM", "mistral", window="all"),
    Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, window="from"),
    Family("Qwen3ForCausalLM", "qwen3", qk_norm="head", window="from", fixed={"attention_bias": False}),
    Family(
        "MixtralForCausalLM",
        "mixtral",
        window="all",
        experts=ExpertNames("block_sparse_moe", ("w1", "w3", "w2"), "num_local_experts", "intermediate_size"),
    ),
    Family(
        "OlmoeForCausalLM",
        "olmoe",
        qk_norm="width",
        fixed={"attention_bias": False, "clip_qkv": None},
        experts=ExpertNames("mlp", PROJECTIONS, "num_experts", "intermediate_size", "norm_topk_prob"),
    ),
    Family(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        qkv_bias=True,
        fixed={**_EVERY_LAYER, "qkv_bias": True},
        experts=ExpertNames("mlp", PROJECTIONS, "num_experts", "moe_intermediate_size", "norm_topk_prob"),
        shared_expert="shared_expert",
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        qk_norm="head",
        fixed={**_EVERY_LAYER, "attention_bias": False},
        experts=ExpertNames("mlp", PROJECTIONS, "num_experts", "moe_intermediate_size", "norm_topk_prob"),
    ),
    DeepSeekFamily.v2(),
    DeepSeekFamily.v3(),
)
"""Families in the order in which an export tries them."""


def family_of(hf: Mapping[str, Any]) -> Family:
    """Return the family of a config.json.

    Raises:
        ConfigError: its architecture is not known.
    """
    named = (hf.get("architectures") or [None])[0]
    for family in FAMILIES:
        if family.architecture == named or (named is None and family.model_type == hf.get("model_type")):
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise ConfigError(
        f"config.json: architecture {named or hf.get('model_type')!r} is not supported: known are {known}"
    )


def plain_family(config: RunConfig) -> tuple[Family, dict[str, Any]] | None:
    """Return the class of transformers that computes the same as a configuration, and its keys; None: there is none."""
    for family in FAMILIES:
        keys = family.keys(config)
        if keys is not None:
            return family, keys
    return None
