"""Megatron-core GPT backbone with our feed-forward layers.

Megatron-core expects CUDA in three places, each replaced here for other devices: rotary embeddings
(`_RotaryOnDevice`), attention (`SdpaCoreAttention`, which is also faster), and fused kernels (disabled).
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dist.config import ModelConfig

FeedForwardFactory = Callable[[int], nn.Module]
"""Function from a layer index, counted from 0, to a module that maps [..., hidden] to [..., hidden]."""


def initialize_megatron(timeout_seconds: int, expert_parallel: int) -> None:
    """Create Megatron-core's process groups (no tensor or pipeline parallelism); collective.

    Args:
        timeout_seconds: timeout of the groups' collectives.
        expert_parallel: number of consecutive ranks that together hold all experts once, as in our mesh.
    """
    if parallel_state.model_parallel_is_initialized():
        if parallel_state.get_expert_model_parallel_world_size() == expert_parallel:
            return
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=expert_parallel,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, timeout_seconds // 60),
    )


def expert_parallel_ranks() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the global ranks of this rank's expert-parallel and expert-data-parallel groups in Megatron-core."""
    groups = (parallel_state.get_expert_model_parallel_group(), parallel_state.get_expert_data_parallel_group())
    parallel, data = (tuple(dist.get_process_group_ranks(group)) for group in groups)
    return parallel, data


def build_gpt(
    model: ModelConfig,
    vocab_size: int,
    feed_forward: FeedForwardFactory,
    seed: int,
    recompute_context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> nn.Module:
    """Build a GPT whose `forward(tokens, positions, attention_mask, labels=...)` returns every token's loss, [B, S].

    Args:
        vocab_size: rows of the embedding.
        feed_forward: creates the feed-forward module of each layer.
        seed: seed of the initial values, the same on all ranks.
        recompute_context: context in which a layer's forward pass is recomputed (activation checkpointing).
    """
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    config = _transformer_config(model)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=model.qk_norm == "head")
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if model.qk_norm == "width":
        attention.q_layernorm = ModuleSpec(module=_NormOfAllHeads, params={"heads": model.heads})
        attention.k_layernorm = ModuleSpec(module=_NormOfAllHeads, params={"heads": model.kv_heads or model.heads})
    spec.submodules.mlp = ModuleSpec(module=_FeedForward, params={"factory": feed_forward})
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        max_sequence_length=model.sequence_length,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
        share_embeddings_and_output_weights=model.tie_embeddings,
    )
    gpt.rotary_pos_emb = _RotaryOnDevice(model)
    if model.activation_checkpointing:
        for layer in gpt.decoder.layers:
            _recompute_in_backward(layer, recompute_context)
    return cast(nn.Module, gpt)


def hidden_states(gpt: nn.Module, tokens_BS: Tensor) -> Tensor:
    """Return the input of the output layer of a `build_gpt` model for each token, [B, S, hidden]."""
    position_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    stage = cast(Any, gpt)
    stage.post_process = False  # makes it an earlier pipeline stage, without output layer
    try:
        hidden_SBD: Tensor = stage(tokens_BS, position_BS, None)
    finally:
        stage.post_process = True
    return hidden_SBD.transpose(0, 1)


def run_layer(gpt: nn.Module, layer: int, hidden_SBD: Tensor) -> Tensor:
    """Return the output of one layer of a `build_gpt` model for the hidden states before it, [S, B, D]."""
    stage = cast(Any, gpt)
    rotary = stage.rotary_pos_emb(hidden_SBD.shape[0])
    output_SBD, _ = stage.decoder.layers[layer](hidden_SBD, attention_mask=None, rotary_pos_emb=rotary)
    return cast(Tensor, output_SBD)


def _transformer_config(model: ModelConfig) -> TransformerConfig:
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads or model.heads,
        kv_channels=model.head_width,
        qk_layernorm=model.qk_norm == "head",
        add_qkv_bias=model.qkv_bias,
        ffn_hidden_size=4 * model.hidden_size,  # size of Megatron's MLP, which ours replaces
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_std,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=True,
        params_dtype=torch.float32,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )


class _FeedForward(nn.Module):
    """Adapter from our feed-forward module to the interface of Megatron-core's MLP, which returns (output, bias)."""

    def __init__(self, config: TransformerConfig, factory: FeedForwardFactory, **_: Any) -> None:
        super().__init__()
        self.factory: FeedForwardFactory | None = factory

    def set_layer_number(self, number: int) -> None:
        """Create the inner module; Megatron-core sets a layer's number, counted from 1, only after its creation."""
        assert self.factory is not None
        self.inner, self.factory = self.factory(number - 1), None

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self.inner(hidden), None


class _NormOfAllHeads(nn.RMSNorm):
    """RMSNorm over all heads of the queries or keys together; takes and returns [S, B, heads, head size]."""

    def __init__(self, heads: int, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(heads * hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each token's vector of all heads."""
        return super().forward(x.flatten(2)).view_as(x)


class SdpaCoreAttention(nn.Module):
    """Causal attention with torch's scaled_dot_product_attention; layout [S, B, heads, head size] of Megatron-core.

    A mask, bool [B, 1, S, S], is true where a token attends, as torch's is and Megatron-core's is not.
    """

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask_B1SS: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """Return [S, B, heads * head size]; `key` and `value` have one head for each query group."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        causal = mask_B1SS is None
        out = F.scaled_dot_product_attention(q, k, v, mask_B1SS, is_causal=causal, enable_gqa=self.grouped)
        return out.permute(2, 0, 1, 3).flatten(2)


class _RotaryOnDevice(RotaryEmbedding):  # type: ignore[misc]
    """Rotary embedding on any device; its frequencies are always float32 and move with the model.

    Megatron-core's class creates them on the current CUDA device and fails for a model on the CPU.
    """

    inv_freq: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model.head_width, 1.0, rotary_base=model.rope_base, use_cpu_initialization=True)
        scaling = model.rope_scaling
        if scaling is not None and scaling.kind == "linear":
            self.inv_freq = self.inv_freq / scaling.factor
        elif scaling is not None:
            factors = (scaling.factor, scaling.low_frequency_factor, scaling.high_frequency_factor)
            self.inv_freq = self._apply_scaling(self.inv_freq, *factors, scaling.original_length)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        self.inv_freq = self.inv_freq.to(fn(torch.empty(0, device=self.inv_freq.device)).device)
        return super()._apply(fn, *args, **kwargs)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        freqs = self.get_freqs_non_repeated(max_seq_len, offset)
        return torch.cat((freqs, freqs), dim=-1)[:, None, None, :]


def _recompute_in_backward(layer: nn.Module, recompute_context: Callable[[], AbstractContextManager[None]]) -> None:
    forward = layer.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        contexts = lambda: (nullcontext(), recompute_context())  # noqa: E731
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    layer.forward = checkpointed
