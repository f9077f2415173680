"""Kinds of feed-forward layer by the value of `moe.kind`: the one place that chooses among them."""

from collections.abc import Callable

from torch import nn

from moe_dist.config import MoEConfig
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.dense_feed_forward import SwiGLU
from moe_dist.moe.layer_context import LayerContext, LayerSizes
from moe_dist.moe.standard_moe import StandardMoE

LayerFactory = Callable[[int, LayerSizes, MoEConfig, LayerContext, float], nn.Module]
"""(layer number, sizes, configuration, context, loss scale) -> a module that takes and returns [..., D]."""

LAYER_KINDS: dict[str, LayerFactory] = {
    "clustered": ClusteredMoE.in_model,
    "standard": StandardMoE.in_model,
    "dense": SwiGLU.in_model,
}
