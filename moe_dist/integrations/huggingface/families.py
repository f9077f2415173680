"""Families of published models that can be imported and exported, each with its keys of config.json.

A family is what one class of transformers computes. What our configuration expresses and no class does is exported with
our own class (`modeling_moe_dist.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_dist.config import RunConfig
from moe_dist.errors import ConfigError
from moe_dist.integrations.huggingface.attention_keys import attention_keys, attention_section

OUR_ARCHITECTURE = "MoeDistForCausalLM"
OUR_MODEL_TYPE = "moe_dist"


@dataclass(frozen=True)
class ExpertNames:
    """Names of a mixture's tensors and keys.

    Attributes:
        block: module of the layer that holds router and experts.
        projections: names of an expert's gate, up and output projections.
        count_key, width_key: keys of the number of experts and of their hidden width.
        normalize_key: key that normalizes the gates; None: they always sum to 1.
    """

    block: str
    projections: tuple[str, str, str]
    count_key: str
    width_key: str
    normalize_key: str | None = None


@dataclass(frozen=True)
class Family:
    """Models of one class of transformers.

    Attributes:
        fixed: keys that must have one value, since other values change the function in a way that we don't have.
        experts: names of a mixture's parts; None: a dense model.
        shared_expert: True if a gated shared expert computes every token.
    """

    architecture: str
    model_type: str
    qk_norm: Literal["none", "head", "width"] = "none"
    qkv_bias: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    experts: ExpertNames | None = None
    shared_expert: bool = False

    def sections(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sections `model` and `moe` of a configuration that computes the same.

        Args:
            hf: content of config.json, with the defaults of the class.

        Raises:
            ConfigError: a key changes the function in a way that we don't have.
        """
        for key, value in {"hidden_act": "silu", **self.fixed}.items():
            if hf.get(key, value) != value:
                raise ConfigError(
                    f"config.json: {key}={hf[key]!r} of a {self.architecture} is not supported: only {value!r}"
                )
        model = attention_section(hf) | {"qk_norm": self.qk_norm, "qkv_bias": self.qkv_bias}
        return {"model": model, "moe": self._moe_section(hf)}

    def _moe_section(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        if self.experts is None:
            return {"kind": "dense", "dense_hidden": hf["intermediate_size"], "expert_hidden": hf["intermediate_size"]}
        names, top_k = self.experts, hf["num_experts_per_tok"]
        normalize = names.normalize_key is None or bool(hf[names.normalize_key])
        if normalize and top_k == 1:
            raise ConfigError(
                "config.json: num_experts_per_tok=1 with a gate of 1 is not supported: the router had no gradient"
            )
        moe = {
            "kind": "standard",
            "experts": hf[names.count_key],
            "top_k": top_k,
            "expert_hidden": hf[names.width_key],
            "normalize_gates": normalize,
            "balance": "aux_loss",
        }
        if self.shared_expert:
            moe |= {"shared_expert_hidden": hf["shared_expert_intermediate_size"], "shared_expert_gate": True}
        return moe

    def keys(self, config: RunConfig) -> dict[str, Any] | None:
        """Return the keys of config.json for a configuration; None if this class does not compute the same."""
        model, moe = config.model, config.moe
        if (model.qk_norm, model.qkv_bias) != (self.qk_norm, self.qkv_bias) or moe.layer_kind.clustered:
            return None
        keys = {**attention_keys(model), "hidden_act": "silu", **self.fixed}
        if self.experts is None:
            return None if moe.layer_kind.routed else {**keys, "intermediate_size": moe.dense_width}
        shared = (moe.shared_expert_hidden > 0, moe.shared_expert_gate)
        if not moe.layer_kind.routed or shared != (self.shared_expert, self.shared_expert) or moe.gate_scale != 1:
            return None
        normalize = moe.normalize_gates and moe.top_k > 1  # of a single expert the gate is its probability over all
        if self.experts.normalize_key is not None:
            keys[self.experts.normalize_key] = normalize
        elif not normalize:
            return None
        if self.shared_expert:
            keys["shared_expert_intermediate_size"] = moe.shared_expert_hidden
        return keys | {
            "num_experts_per_tok": moe.top_k,
            self.experts.count_key: moe.experts,
            self.experts.width_key: moe.expert_hidden,
        }


_NO_BIASES = {"attention_bias": False, "mlp_bias": False}
_NO_WINDOW = {"use_sliding_window": False}
_EVERY_LAYER = {**_NO_WINDOW, "decoder_sparse_step": 1, "mlp_only_layers": []}
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

FAMILIES = (
    Family("LlamaForCausalLM", "llama", fixed=_NO_BIASES),
    Family("MistralForCausalLM", "mistral", fixed={"sliding_window": None}),
    Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, fixed=_NO_WINDOW),
    Family("Qwen3ForCausalLM", "qwen3", qk_norm="head", fixed={**_NO_WINDOW, "attention_bias": False}),
    Family(
        "MixtralForCausalLM",
        "mixtral",
        fixed={"sliding_window": None},
        experts=ExpertNames("block_sparse_moe", ("w1", "w3", "w2"), "num_local_experts", "intermediate_size"),
    ),
    Family(
        "OlmoeForCausalLM",
        "olmoe",
        qk_norm="width",
        fixed={"attention_bias": False, "clip_qkv": None},
        experts=ExpertNames("mlp", _PROJECTIONS, "num_experts", "intermediate_size", "norm_topk_prob"),
    ),
    Family(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        qkv_bias=True,
        fixed={**_EVERY_LAYER, "qkv_bias": True},
        experts=ExpertNames("mlp", _PROJECTIONS, "num_experts", "moe_intermediate_size", "norm_topk_prob"),
        shared_expert=True,
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        qk_norm="head",
        fixed={**_EVERY_LAYER, "attention_bias": False},
        experts=ExpertNames("mlp", _PROJECTIONS, "num_experts", "moe_intermediate_size", "norm_topk_prob"),
    ),
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
