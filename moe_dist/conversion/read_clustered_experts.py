"""Full experts of a clustered layer, from their effective weights."""

from collections.abc import Collection
from dataclasses import fields

from torch import Tensor

from moe_dist.compression import ExpertMatrices, ExpertResidual
from moe_dist.conversion.calibration_tokens import LayerTokens
from moe_dist.conversion.full_experts import VECTORS, FullExpert, FullExpertLayer
from moe_dist.conversion.residual_exchange import STACKED, owner_ranks
from moe_dist.distributed.mesh import GroupKind
from moe_dist.engine.gathered_optimizer_state import GatheredOptimizerState, OwnedState
from moe_dist.engine.optimizer_state import MASTER, STATE_NAMES, OptimizerState
from moe_dist.moe.clustered_moe import ClusteredMoE


def read_clustered_experts(
    layer: ClusteredMoE, state: OptimizerState, fit: LayerTokens, check: LayerTokens, clusters: Collection[int]
) -> FullExpertLayer:
    """Read the local experts of some clusters with their effective weights `B + U V`; collective.

    Args:
        clusters: clusters of the present placement to read, the same on all ranks.
    """
    mesh, placement = layer.context.mesh, layer.placement
    here = placement.clusters_of_block(mesh.at.cluster)
    experts = []
    for cluster, part in zip(here, layer.clusters, strict=True):
        if cluster in clusters or cluster == here[0]:  # at least one, for shapes
            whole = {
                name.rpartition(".")[2]: OwnedState.of(state, parameter, mesh).whole(parameter.device)
                for name, parameter in part.named_parameters()
            }
            base = ExpertMatrices(whole["w_in_DH"][MASTER], whole["w_out_FD"][MASTER])
            for slot, expert in enumerate(placement.experts_of(cluster, mesh.at.shard)):
                matrices = base.with_residual(_residual(whole, slot))
                experts.append(FullExpert(expert, matrices, fit[expert], check[expert], _vectors(whole, slot)))
    return FullExpertLayer(experts, owner_ranks(placement), mesh.group(GroupKind.EXPERT_PARALLEL), STATE_NAMES)


def _residual(whole: dict[str, GatheredOptimizerState], slot: int) -> ExpertResidual:
    values: dict[str, Tensor | None] = {
        field.name: whole[STACKED[field.name]][MASTER][slot] if STACKED[field.name] in whole else None
        for field in fields(ExpertResidual)
    }
    return ExpertResidual(**values)  # type: ignore[arg-type]


def _vectors(whole: dict[str, GatheredOptimizerState], slot: int) -> dict[str, dict[str, Tensor]]:
    if STACKED[VECTORS[0]] not in whole:
        return {}
    return {kind: {name: whole[STACKED[name]][kind][slot] for name in VECTORS} for kind in STATE_NAMES}
