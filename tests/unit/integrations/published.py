"""Tiny random models of the published families, saved as transformers saves them, and our logits of imported runs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.checkpoint.load_model import load_model
from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.config import WorldConfig
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from tests.unit.data.samples import hf_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "intermediate_size": 24, "rms_norm_eps": 1e-6, "eos_token_id": 1, "bos_token_id": 0,
    "pad_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
EIGHT: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7,
    "mscale_all_dim": 0.5,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
    "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
GROUPS = {"n_group": 4, "topk_group": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama with its own head width and tied embeddings": ("Llama", {"head_dim": 12, "tie_word_embeddings": True}),
    "Llama 3": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
    "Llama stretched": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral with a window": ("Mistral", {"sliding_window": 7}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2 with a window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "Mixtral with a window": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 5}),
    "OLMoE": ("Olmoe", EIGHT),
    "OLMoE normalized": ("Olmoe", {**EIGHT, "norm_topk_prob": True}),
    "Qwen2-MoE": ("Qwen2Moe", {**EIGHT, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20}),
    "Qwen3 stretched": ("Qwen3", {"head_dim": 8, "rope_parameters": {**YARN, "mscale": None, "mscale_all_dim": None}}),
    "DeepSeek-V2": ("DeepseekV2", {**LATENT, "q_lora_rank": None, "n_shared_experts": 2, "rope_parameters": YARN}),
    "DeepSeek-V2 in groups": (
        "DeepseekV2",
        {**LATENT, **GROUPS, "q_lora_rank": 8, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0},
    ),
    "DeepSeek-V3": ("DeepseekV3", {**LATENT, **GROUPS, "q_lora_rank": 8, "rope_parameters": YARN}),
    "DeepSeek-V3 ungrouped": (
        "DeepseekV3",
        {**LATENT, "q_lora_rank": 8, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
    ),
    "Qwen3-MoE": ("Qwen3Moe", {**EIGHT, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True}),
}
TOKENS_BS = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(1))


def published(folder: Path, name: str, **more: Any) -> nn.Module:
    """Save a model of that name, with a tokenizer, and return it."""
    import transformers

    family, keys = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **keys, **more})
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which start at one and zero
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(folder)  # type: ignore[operator]
    hf_tokenizer(folder)
    return model


@torch.no_grad()
def their_logits(model: nn.Module, tokens_BS: Tensor = TOKENS_BS) -> Tensor:
    """The logits of a model of transformers."""
    logits: Tensor = model(tokens_BS).logits
    return logits


def our_logits(runs: list[Path], tokens_BS: Tensor = TOKENS_BS) -> list[Tensor]:
    """The logits of our model of each run; in a process of its own."""
    process = init_distributed(WorldConfig(backend="gloo", timeout_seconds=60))
    found = []
    for run in runs:
        model = load_model(find_weights(run), Mesh.alone(), Links.alone(), process.device, torch.float32)
        position_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        with model.evaluating():
            found.append(model.gpt(tokens_BS, position_BS, None))
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
