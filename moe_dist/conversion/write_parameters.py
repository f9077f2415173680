"""Writing of a compressed layer into parameters and optimizer state."""

from collections.abc import Iterator

from torch import nn

from moe_dist.conversion.compress import CompressedLayer
from moe_dist.conversion.residual_exchange import stack_states
from moe_dist.engine.gathered_optimizer_state import write_whole
from moe_dist.engine.optimizer_state import MASTER, OptimizerState
from moe_dist.moe.clustered_moe import ClusteredMoE


def write_layer(compressed: CompressedLayer, layer: ClusteredMoE, state: OptimizerState) -> None:
    """Write the new bases and residuals of this rank's clusters."""
    placement, at = compressed.placement, layer.context.mesh.at
    for cluster, parameters in parameters_of(compressed, layer):
        base = compressed.bases[cluster]
        write_whole(state, parameters["base.w_in_DH"], {MASTER: base.w_in_DH})
        write_whole(state, parameters["base.w_out_FD"], {MASTER: base.w_out_FD})
        here = [compressed.residuals[expert] for expert in placement.experts_of(cluster, at.shard)]
        for name, whole in stack_states(here).items():
            write_whole(state, parameters[f"residuals.{name}"], whole)


def parameters_of(compressed: CompressedLayer, layer: ClusteredMoE) -> Iterator[tuple[int, dict[str, nn.Parameter]]]:
    """Yield the parameters that `write_layer` writes, by cluster."""
    here = compressed.placement.clusters_of_block(layer.context.mesh.at.cluster)
    for cluster, part in zip(here, layer.clusters, strict=True):
        if cluster in compressed.bases:
            yield cluster, dict(part.named_parameters())
