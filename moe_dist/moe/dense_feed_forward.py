"""Dense SwiGLU feed-forward network: the lower bound in time and the baseline in quality."""

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
