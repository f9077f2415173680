"""Registry of feed-forward layers by the value of `moe.kind`."""

from collections.abc import Callable

from torch import nn

from moe_dist.config import MoEConfig
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.dense_feed_forward import SwiGLU
from moe_dist.moe.layer_context import LayerContext, LayerSizes
from moe_dist.moe.standard_moe import StandardMoE

LayerFactory = Callable[[int, LayerSizes, MoEConfig, LayerContext, float], nn.Module]
"""Function from layer number, sizes, configuration, context, loss scale to a module that maps [..., D] to [..., D]."""

LAYER_KINDS: dict[str, LayerFactory] = {
    "clustered": ClusteredMoE.in_model,
    "standard": StandardMoE.in_model,
    "dense": SwiGLU.in_model,
}
