"""Families of DeepSeek-V2 and V3: latent attention, leading dense layers, shared experts, groups of experts."""

from collections.abc import Mapping
from typing import Any, Self

from moe_dist.config import MoEConfig, RunConfig
from moe_dist.errors import ConfigError
from moe_dist.integrations.huggingface.attention_keys import attention_keys
from moe_dist.integrations.huggingface.family import PROJECTIONS, ExpertNames, Family

BIAS_RATE = 1e-3
"""Update of a selection bias per step of DeepSeek-V3 (arXiv 2412.19437), on the scale of sigmoids."""


class DeepSeekFamily(Family):
    """Models of DeepSeek-V2 (gates by a softmax) or V3 (by sigmoids, with selection biases)."""

    @classmethod
    def v2(cls) -> Self:
        """Return the family of DeepSeek-V2."""
        names = ExpertNames("mlp", PROJECTIONS, "n_routed_experts", "moe_intermediate_size")
        fixed = {"attention_bias": False, "mlp_bias": False}
        return cls("DeepseekV2ForCausalLM", "deepseek_v2", fixed=fixed, experts=names, shared_expert="shared_experts")

    @classmethod
    def v3(cls) -> Self:
        """Return the family of DeepSeek-V3."""
        names = ExpertNames("mlp", PROJECTIONS, "n_routed_experts", "moe_intermediate_size", "norm_topk_prob")
        return cls(
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            fixed={"attention_bias": False, "rope_interleave": True},
            experts=names,
            shared_expert="shared_experts",
            selection_bias="gate.e_score_correction_bias",
        )

    def _moe_section(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        v3 = self.selection_bias is not None
        normalize = v3 and bool(hf["norm_topk_prob"])
        if normalize and hf["num_experts_per_tok"] == 1:
            raise ConfigError("config.json: num_experts_per_tok=1 with norm_topk_prob=true is not supported")
        grouped = v3 or hf["topk_method"] == "group_limited_greedy"
        return {
            "kind": "standard",
            "experts": hf["n_routed_experts"],
            "top_k": hf["num_experts_per_tok"],
            "expert_hidden": hf["moe_intermediate_size"],
            "dense_hidden": hf["intermediate_size"],
            "dense_layers": hf["first_k_dense_replace"],
            "shared_expert_hidden": hf["moe_intermediate_size"] * hf["n_shared_experts"],
            "normalize_gates": normalize,
            "gate_scale": hf["routed_scaling_factor"],
            "score": "sigmoid" if v3 else "softmax",
            "groups": (hf["n_group"] or 1) if grouped else 1,
            "top_groups": (hf["topk_group"] or 1) if grouped else 1,
            **({"balance": "bias", "balance_rate": BIAS_RATE} if v3 else {"balance": "aux_loss"}),
        }

    def keys(self, config: RunConfig) -> dict[str, Any] | None:
        """Return the keys of config.json for a configuration; None if this class does not compute the same."""
        model, moe, v3 = config.model, config.moe, self.selection_bias is not None
        if model.latent is None or moe.kind != "standard" or not self._computes(moe):
            return None
        keys = {
            **attention_keys(model),
            "hidden_act": "silu",
            **self.fixed,
            "intermediate_size": moe.dense_width,
            "first_k_dense_replace": moe.dense_layers,
            "n_routed_experts": moe.experts,
            "n_shared_experts": moe.shared_expert_hidden // moe.expert_hidden,
            "moe_intermediate_size": moe.expert_hidden,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.normalize_gates,
            "routed_scaling_factor": moe.gate_scale,
            "n_group": moe.groups,
            "topk_group": moe.top_groups,
        }
        method = "greedy" if moe.groups == 1 else "group_limited_greedy"
        return keys if v3 else keys | {"topk_method": method}

    def _computes(self, moe: MoEConfig) -> bool:
        v3 = self.selection_bias is not None
        shared = moe.shared_expert_hidden and moe.shared_expert_hidden % moe.expert_hidden == 0
        if not shared or moe.shared_expert_gate or (moe.score == "sigmoid") != v3:
            return False
        return (v3 or not moe.normalize_gates) and (moe.top_k > 1 or not moe.normalize_gates)
