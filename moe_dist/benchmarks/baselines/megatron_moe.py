"""Megatron-core's own MoE layer as a baseline of benchmarks; no model is trained with it.

On a GPU it runs unchanged. Megatron-core does not support the CPU; there `stand_ins` replaces what needs CUDA, and
nothing that communicates: the current device, a router GEMM of Transformer Engine, and the copy of split sizes to the
host by a side stream. Without Transformer Engine LatentMoE's two projections are torch's linear layers. Grouped GEMMs
are off on the CPU, so that experts run one after the other.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe import moe_layer, moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_dist.config import RunConfig
from moe_dist.model.megatron_backbone import initialize_megatron


class MegatronMoE(nn.Module):
    """`MoELayer` over all ranks with our standard layer's sizes, dropless, without auxiliary loss; [T, D] -> [T, D]."""

    def __init__(self, config: RunConfig, ranks: int, latent: int | None = None) -> None:
        """Create the layer; collective, since Megatron-core forms its process groups here.

        Args:
            latent: width of the experts' inputs and outputs (LatentMoE), to and from which all tokens are projected;
                None: that of the model.
        """
        super().__init__()
        initialize_megatron(config.world.timeout_seconds, ranks)
        torch.manual_seed(config.seed)
        spec = get_moe_module_spec(use_te=False, num_experts=config.moe.experts, moe_grouped_gemm=_has_cuda())
        with stand_ins():
            self.layer: Any = MoELayer(_transformer_config(config, ranks, latent), spec.submodules, layer_number=1)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Run forward or backward; call it inside `stand_ins`."""
        y_TD: Tensor = self.layer(x_TD[:, None])[0][:, 0]
        return y_TD


@contextmanager
def stand_ins() -> Iterator[None]:
    """Replace what Megatron-core's MoE layer needs of CUDA and of Transformer Engine while entered, where it is not."""
    with ExitStack() as undo:
        if not moe_layer.HAVE_TE:
            _set(undo, moe_layer, "HAVE_TE", True)
            _set(undo, moe_layer, "TELinear", _Projection)
        if not _has_cuda():
            _set(undo, torch.cuda, "current_device", lambda: "cpu")
            _set(undo, moe_utils, "te_general_gemm", None)
            _set(undo, MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", object())
            _set(undo, MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize", _splits_to_lists)
        yield


class _Projection(nn.Linear):
    """Linear layer in the place of Transformer Engine's, in float32 and without bias."""

    def __init__(self, inputs: int, outputs: int, *, init_method: Callable[[Tensor], Any], **_: Any) -> None:
        super().__init__(inputs, outputs, bias=False)
        with torch.no_grad():
            init_method(self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return the output, and no bias."""
        return super().forward(x), None


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    existed, before = hasattr(owner, name), getattr(owner, name, None)
    setattr(owner, name, value)
    undo.callback(lambda: setattr(owner, name, before) if existed else delattr(owner, name))


def _splits_to_lists(dispatcher: Any, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
    """Return split sizes as lists, which gloo needs, instead of a copy from the GPU."""
    for name in ("input_splits", "output_splits"):
        if isinstance(splits := getattr(dispatcher, name), Tensor):
            setattr(dispatcher, name, splits.tolist())
    return tokens_per_expert


def _transformer_config(config: RunConfig, ranks: int, latent: int | None) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=config.model.hidden_size,
        num_attention_heads=config.model.heads,
        ffn_hidden_size=config.moe.expert_hidden,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=not _has_cuda(),
        params_dtype=torch.float32,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        moe_latent_size=latent,
        **moe_options(config, ranks),
    )


def moe_options(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Return the values of `TransformerConfig` for standard experts over `ranks` ranks of a group."""
    moe = config.moe
    return {
        "moe_ffn_hidden_size": moe.expert_hidden,
        "num_moe_experts": moe.experts,
        "moe_router_topk": moe.top_k,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": _has_cuda(),
        "expert_model_parallel_size": ranks,
    }
