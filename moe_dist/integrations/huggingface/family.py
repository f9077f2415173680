"""Family of published models: what one class of transformers computes, and its keys of config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_dist.config import ModelConfig, RunConfig
from moe_dist.errors import ConfigError
from moe_dist.integrations.huggingface.attention_keys import attention_keys, attention_section, window_section

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Names of most networks' gate, up and output projections."""


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
        window: layers that may have a sliding window: none, all alike, or those from one on.
        fixed: keys that must have one value, since other values change the function in a way that we don't have.
        experts: names of a mixture's parts; None: a dense model.
        shared_expert: name of the expert that computes every token; None: there is none.
        selection_bias: name of the selection biases in a mixture's block; None: there is no place for them.
    """

    architecture: str
    model_type: str
    qk_norm: Literal["none", "head", "width"] = "none"
    qkv_bias: bool = False
    window: Literal["none", "all", "from"] = "none"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    experts: ExpertNames | None = None
    shared_expert: str | None = None
    selection_bias: str | None = None

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
        if self.window != "none":
            model |= window_section(hf)
        return {"model": model, "moe": self._moe_section(hf)}

    def _window_keys(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys of the sliding window, None where there is none."""
        if self.window == "none":
            return {}
        keys: dict[str, Any] = {"sliding_window": model.window}
        if self.window == "from":
            keys |= {"use_sliding_window": model.window is not None, "max_window_layers": model.window_from}
        return keys

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
        windows = {"none": model.window is None, "all": model.window_from == 0, "from": True}
        if model.latent is not None or not windows[self.window]:
            return None
        keys = {**attention_keys(model), "hidden_act": "silu", **self.fixed, **self._window_keys(model)}
        if self.experts is None:
            return None if moe.layer_kind.routed else {**keys, "intermediate_size": moe.dense_width}
        shared = (moe.shared_expert_hidden > 0, moe.shared_expert_gate)
        wanted = (self.shared_expert is not None, self.shared_expert is not None)
        if not moe.layer_kind.routed or shared != wanted or moe.gate_scale != 1 or not _is_plain(config):
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


def _is_plain(config: RunConfig) -> bool:
    """Return True if every layer is a mixture that chooses among all experts by a softmax."""
    moe = config.moe
    return moe.score == "softmax" and moe.groups == 1 and not moe.dense_layers
