"""Megatron-core GPT backbone with our feed-forward layers.

Megatron-core expects CUDA in several places, each replaced for other devices: rotary embeddings and core attention
(`megatron_attention.py`), collectives of tensor parallelism (`megatron_tensor_parallel.py`), and fused kernels
(disabled).
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dist.config import ModelConfig
from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.model.initial_values import draw_initial_values
from moe_dist.model.megatron_attention import RotaryOnDevice, SdpaCoreAttention
from moe_dist.model.megatron_latent_attention import LatentNorm, install_stand_in, latent_keys, replace_rotary
from moe_dist.model.megatron_tensor_parallel import check_vocabulary, install_stand_ins, mark_shards
from moe_dist.model.pipeline_stage import StageLayers, number_layers, positions, rotary_positions

FeedForwardFactory = Callable[[int], nn.Module]
"""Function from a layer index, counted from 0, to a module that maps [..., hidden] to [..., hidden]."""


def initialize_megatron(
    timeout_seconds: int, expert_parallel: int, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> None:
    """Create Megatron-core's process groups; collective.

    Context parallelism needs no group of Megatron-core: a part of a sequence is a whole sequence for its modules.

    Args:
        timeout_seconds: timeout of the groups' collectives.
        expert_parallel: number of consecutive ranks that together hold all experts once, as in our mesh.
        tensor_parallel: number of consecutive ranks that divide attention.
        pipeline_parallel: number of stages, each of which is a run of consecutive ranks.
    """
    wanted = (expert_parallel, tensor_parallel, pipeline_parallel)
    if parallel_state.model_parallel_is_initialized():
        sizes = (
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        if sizes == wanted:
            return
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=1,
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
    recompute_context: Callable[[], AbstractContextManager[None]],
    mesh: Mesh,
) -> nn.Module:
    """Build a GPT whose `forward(tokens, positions, attention_mask, labels=...)` returns every token's loss, [B, S].

    With pipeline parallelism only this rank's stage, whose passes are `run_chunk`. Tied embeddings are then a parameter
    of the first stage alone, and the last one has an output layer without weight.

    Args:
        vocab_size: rows of the embedding.
        feed_forward: creates the feed-forward module of a layer by its number in the whole model.
        seed: seed of the initial values, the same on all ranks.
        recompute_context: context in which a layer's forward pass is recomputed (activation checkpointing).
        mesh: ranks over which attention is divided (`WorldShape.tensor`, `context`); its tokens, positions and labels
            are then this rank's part of each sequence.

    Raises:
        ConfigError: the vocabulary does not divide over the tensor group.
    """
    tensor, layers = mesh.shape.tensor, StageLayers.of(model.layers, mesh)
    check_vocabulary(vocab_size, tensor)
    if tensor > 1 or layers.stages > 1 or model.latent is not None:
        install_stand_ins()
    if model.latent is not None:
        install_stand_in()
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    spec, of_stage = attention_spec(model, mesh, layers.numbers), lambda index: feed_forward(layers.numbers[index])
    spec.submodules.mlp = ModuleSpec(module=_FeedForward, params={"factory": of_stage})
    tied = model.tie_embeddings and layers.stages == 1
    gpt = stage_model(model, vocab_size, layers, transformer_config(model, tensor), spec, tied)
    if model.tie_embeddings and layers.last and layers.stages > 1:
        gpt.output_layer.weight = None
    if model.latent is not None:
        replace_rotary(gpt, model)
    else:
        gpt.rotary_pos_emb = RotaryOnDevice(model, mesh.in_attention.context)
    if tensor > 1:
        mark_shards(gpt)
    draw_initial_values(gpt, model, seed, tensor, mesh.in_attention.tensor)
    if model.activation_checkpointing:
        for layer in gpt.decoder.layers:
            _recompute_in_backward(layer, recompute_context)
    return cast(nn.Module, gpt)


def stage_model(
    model: ModelConfig,
    vocab_size: int,
    layers: StageLayers,
    transformer: TransformerConfig,
    spec: ModuleSpec,
    tied: bool,
) -> Any:
    """Return Megatron-core's GPT of one pipeline stage, its layers named by their numbers in the whole model."""
    gpt = GPTModel(
        config=transformer,
        transformer_layer_spec=TransformerBlockSubmodules([spec] * len(layers.numbers), layer_norm=RmsNorm),
        vocab_size=vocab_size,
        max_sequence_length=model.sequence_length,
        pre_process=layers.first,
        post_process=layers.last,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
        share_embeddings_and_output_weights=tied,
    )
    number_layers(gpt, layers)
    return gpt


def attention_spec(model: ModelConfig, mesh: Mesh, numbers: Sequence[int]) -> ModuleSpec:
    """Return the modules of a layer, of which the feed-forward part is Megatron-core's and meant to be replaced.

    Args:
        numbers: number in the model, from 0, of each layer that Megatron-core counts here, from 1.
    """
    latent = model.latent is not None
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=model.qk_norm == "head", multi_latent_attention=latent
    )
    attention = spec.submodules.self_attention.submodules
    windows = [model.window_of(number) for number in numbers]
    core = {"context": mesh.groups.get(GroupKind.CONTEXT), "windows": windows}
    attention.core_attention = ModuleSpec(module=SdpaCoreAttention, params=core)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RmsNorm
    if latent:
        attention.q_layernorm = attention.kv_layernorm = LatentNorm
    if model.qk_norm == "head":
        attention.q_layernorm = attention.k_layernorm = RmsNorm
    if model.qk_norm == "width":
        attention.q_layernorm = ModuleSpec(module=_NormOfAllHeads, params={"heads": model.heads})
        attention.k_layernorm = ModuleSpec(module=_NormOfAllHeads, params={"heads": model.kv_heads or model.heads})
    return spec


def hidden_states(gpt: nn.Module, tokens_BS: Tensor) -> Tensor:
    """Return the input of the output layer of a `build_gpt` model for each token, [B, S, hidden]."""
    stage = cast(Any, gpt)
    stage.post_process = False  # makes it an earlier pipeline stage, without output layer
    try:
        hidden_SBD: Tensor = stage(tokens_BS, positions(tokens_BS), None)
    finally:
        stage.post_process = True
    return hidden_SBD.transpose(0, 1)


def run_layer(gpt: nn.Module, layer: int, hidden_SBD: Tensor) -> Tensor:
    """Return the output of one layer of a `build_gpt` model for the hidden states before it, [S, B, D]."""
    stage = cast(Any, gpt)
    rotary = rotary_positions(gpt, hidden_SBD.shape[0])
    output_SBD, _ = stage.decoder.layers[layer](hidden_SBD, attention_mask=None, rotary_pos_emb=rotary)
    return cast(Tensor, output_SBD)


def transformer_config(model: ModelConfig, tensor_parallel: int) -> TransformerConfig:
    """Return Megatron-core's configuration of the backbone, without that of feed-forward layers."""
    make, latent = (TransformerConfig, {}) if model.latent is None else (MLATransformerConfig, latent_keys(model))
    rotated = 1.0 if model.rope_scaling is None else model.rope_scaling.rotation_scale
    return make(
        **latent,
        softmax_scale=None if rotated == 1 or latent else rotated**2 / math.sqrt(model.head_width),
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=tensor_parallel > 1,
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
        init_method=_keep,  # `draw_initial_values` draws by name, for equal values in every layout
        output_layer_init_method=_keep,
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


def _keep(value: Tensor) -> Tensor:
    return value


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


class RmsNorm(nn.RMSNorm):
    """RMSNorm of the last dimension; Megatron-core's refuses sequence parallelism, which it needs nothing for."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)


class _NormOfAllHeads(nn.RMSNorm):
    """RMSNorm over all heads of the queries or keys together; takes and returns [S, B, heads, head size]."""

    def __init__(self, heads: int, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(heads * hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each token's vector of all heads."""
        return super().forward(x.flatten(2)).view_as(x)


def _recompute_in_backward(layer: nn.Module, recompute_context: Callable[[], AbstractContextManager[None]]) -> None:
    forward = layer.forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        contexts = lambda: (nullcontext(), recompute_context())  # noqa: E731
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    layer.forward = checkpointed
