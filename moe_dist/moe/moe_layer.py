"""Base of the MoE layers, which are created alone by their constructor or as a part of our model by `in_model`."""

from typing import Self

from torch import nn

from moe_dist.config import MoEConfig
from moe_dist.moe.layer_context import LayerContext, LayerSizes


class MoELayer(nn.Module):
    """MoE layer with a context; a subclass creates its modules in `_build`."""

    @classmethod
    def in_model(cls, layer: int, sizes: LayerSizes, moe: MoEConfig, context: LayerContext, loss_scale: float) -> Self:
        """Create layer number `layer` of a model whose layers share a context."""
        self = cls.__new__(cls)
        self._build(layer, sizes, moe, context, loss_scale)
        return self

    def _build(self, layer: int, sizes: LayerSizes, moe: MoEConfig, context: LayerContext, loss_scale: float) -> None:
        super().__init__()
        self.layer, self.moe, self.context, self.balance = layer, moe, context, context.balance
        self.loss_scale = loss_scale
