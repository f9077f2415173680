"""Full experts of a clustered layer, from their effective weights."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor

from moe_dist.compression import ExpertMatrices, ExpertResidual
from moe_dist.conversion.calibration_tokens import LayerTokens
from moe_dist.conversion.full_experts import VECTORS, FullExpert, FullExpertLayer
from moe_dist.conversion.residual_exchange import STACKED, owner_ranks
from moe_dist.distributed.mesh import GroupKind
from moe_dist.engine.gathered_optimizer_state import OwnedState
from moe_dist.engine.optimizer_state import MASTER, STATE_NAMES, OptimizerState
from moe_dist.memory.saved_cluster import SavedCluster
from moe_dist.moe.clustered_experts import SharedBase
from moe_dist.moe.clustered_moe import ClusteredMoE

ReadState = Callable[[str, str], Tensor]
"""Function of a parameter's name and one of `STATE_NAMES` to the whole tensor, float32."""


def read_clustered_experts(
    layer: ClusteredMoE,
    state: OptimizerState,
    fit: LayerTokens,
    check: LayerTokens,
    clusters: Collection[int],
    saved: Mapping[int, SavedCluster],
) -> FullExpertLayer:
    """Return the local experts of some clusters with their effective weights `B + U V`; collective.

    Args:
        clusters: clusters of the present placement to read, the same on all ranks.
        saved: copies of those of this rank's clusters that are offloaded, from which their weights are read.
    """
    mesh, placement = layer.context.mesh, layer.placement
    shared = None if layer.shared_base is None else _shared_matrices(layer.shared_base, layer, state)
    experts = []
    for cluster, part in zip(placement.clusters_of_block(mesh.at.cluster), layer.clusters, strict=True):
        if cluster in clusters:
            named = dict(part.named_parameters())
            read = partial(_read_saved, state, saved[cluster]) if cluster in saved else _gathered(named, layer, state)
            for slot, expert in enumerate(placement.experts_of(cluster, mesh.at.shard)):
                load = partial(_effective, read, slot, shared, layer.moe.expert_vectors)
                vectors = _vectors(read, slot) if layer.moe.expert_vectors else {}
                experts.append(FullExpert(expert, load, fit[expert], check[expert], vectors))
    size, width, device = layer.router.weight_ED.shape[1], layer.moe.expert_hidden, layer.router.weight_ED.device
    zeros = ExpertMatrices(torch.zeros(size, 2 * width, device=device), torch.zeros(width, size, device=device))
    group = mesh.group(GroupKind.EXPERT_PARALLEL)
    return FullExpertLayer(experts, owner_ranks(placement), group, STATE_NAMES, zeros, shared)


def _gathered(named: Mapping[str, torch.nn.Parameter], layer: ClusteredMoE, state: OptimizerState) -> ReadState:
    """Gather the whole state of some parameters; collective over the ranks that hold them."""
    mesh = layer.context.mesh
    whole = {name: OwnedState.of(state, value, mesh).whole(value.device) for name, value in named.items()}
    return lambda name, kind: whole[name][kind]


def _read_saved(state: OptimizerState, saved: SavedCluster, name: str, kind: str) -> Tensor:
    assert state.offloaded is not None
    return saved.read(name, state.offloaded.memory.kind_of(kind))


def _shared_matrices(shared: SharedBase, layer: ClusteredMoE, state: OptimizerState) -> ExpertMatrices:
    read = _gathered(dict(shared.named_parameters()), layer, state)
    return ExpertMatrices(read("w_in_DH", MASTER), read("w_out_FD", MASTER))


def _effective(read: ReadState, slot: int, shared: ExpertMatrices | None, vectors: bool) -> ExpertMatrices:
    """Return the effective weights of a cluster's expert."""
    names = [field.name for field in fields(ExpertResidual)]
    values: dict[str, Tensor | None] = {
        name: read(f"residuals.{STACKED[name]}", MASTER)[slot] if vectors or name not in VECTORS else None
        for name in names
    }
    if shared is None:
        base = ExpertMatrices(read("base.w_in_DH", MASTER), read("base.w_out_FD", MASTER))
    else:
        names = ["in_p_DR", "in_q_RH", "out_p_FR", "out_q_RD"]
        base = shared.with_factors(*(read(f"base.{name}", MASTER) for name in names))
    return base.with_residual(ExpertResidual(**values))  # type: ignore[arg-type]


def _vectors(read: ReadState, slot: int) -> dict[str, dict[str, Tensor]]:
    return {kind: {name: read(f"residuals.{STACKED[name]}", kind)[slot] for name in VECTORS} for kind in STATE_NAMES}
