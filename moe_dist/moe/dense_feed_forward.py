"""Dense SwiGLU feed-forward network: a whole layer, the baseline of the others, or the shared expert of a layer."""

from typing import Self

import torch
from torch import Tensor, nn

from moe_dist.compression import init_base
from moe_dist.config import MoEConfig
from moe_dist.moe.init_generator import generator
from moe_dist.moe.layer_context import LayerContext, LayerSizes
from moe_dist.moe.standard_experts import swiglu


class SwiGLU(nn.Module):
    """Dense network y = (silu(x W_gate) * (x W_up)) W_out. Shapes: D hidden, F inner width, H = 2F."""

    def __init__(self, layer: int, width: int, model: LayerSizes, seed: int, name: str = "dense") -> None:
        super().__init__()
        draw = generator(seed, layer, name, 0)
        w_in_DH, w_out_FD = init_base(model.hidden_size, width, model.init_std, model.output_init_std, draw)
        self.w_in_DH = nn.Parameter(w_in_DH)
        self.w_out_FD = nn.Parameter(w_out_FD)

    @classmethod
    def in_model(
        cls, layer: int, sizes: LayerSizes, moe: MoEConfig, context: LayerContext, loss_scale: float
    ) -> "SwiGLU":
        """Create layer number `layer` of a model, of width `moe.dense_width`."""
        return cls(layer, moe.dense_width, sizes, context.seed)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return y of `hidden` [..., D], in its shape."""
        return swiglu(hidden @ self.w_in_DH) @ self.w_out_FD


class SharedExpert(SwiGLU):
    """Expert that computes every token, scaled by a sigmoid gate if `moe.shared_expert_gate` is set."""

    def __init__(self, layer: int, model: LayerSizes, moe: MoEConfig, seed: int) -> None:
        super().__init__(layer, moe.shared_expert_hidden, model, seed, "shared expert")
        self.gate_D = nn.Parameter(torch.zeros(model.hidden_size)) if moe.shared_expert_gate else None

    @classmethod
    def of_layer(cls, layer: int, model: LayerSizes, moe: MoEConfig, seed: int) -> Self | None:
        """Create the shared expert of a layer; None if there is none."""
        return cls(layer, model, moe, seed) if moe.shared_expert_hidden else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return y of `hidden` [..., D], in its shape."""
        y = super().forward(hidden)
        return y if self.gate_D is None else torch.sigmoid(hidden @ self.gate_D).unsqueeze(-1) * y
