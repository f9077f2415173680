"""Writing of compressed clusters into parameters and optimizer state."""

from moe_dist.conversion.compress import CompressedCluster
from moe_dist.conversion.residual_exchange import stack_states
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.gathered_optimizer_state import write_whole
from moe_dist.engine.optimizer_state import OptimizerState
from moe_dist.moe.clustered_moe import ClusteredMoE


def write_cluster(
    compressed: CompressedCluster, placement: ExpertPlacement, layer: ClusteredMoE, state: OptimizerState
) -> None:
    """Write a new base and its residuals, if the cluster is on this rank.

    Args:
        placement: placement that the layer will follow.
    """
    at, cluster = layer.context.mesh.at, compressed.number
    if placement.block_of_cluster[cluster] != at.cluster:
        return
    parameters = dict(layer.clusters[placement.local_index(cluster)].named_parameters())
    here = [compressed.residuals[expert] for expert in placement.experts_of(cluster, at.shard)]
    for name, whole in compressed.base.items():
        write_whole(state, parameters[f"base.{name}"], whole)
    for name, whole in stack_states(here).items():
        write_whole(state, parameters[f"residuals.{name}"], whole)
