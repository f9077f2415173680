"""Reads the standard experts of a layer, their hidden units in an order that all of them share."""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.compression import ExpertMatrices, UnitOrder, align_hidden_units
from moe_dist.conversion.held import HeldExpert, HeldLayer
from moe_dist.conversion.tokens import LayerTokens
from moe_dist.engine.training_state import MASTER, MOMENTS, STATE_NAMES, TrainingState
from moe_dist.engine.whole_state import OwnedState
from moe_dist.model.standard_layer import StandardMoE
from moe_dist.topology.mesh import GroupKind, Mesh, RankGroup

States = dict[str, ExpertMatrices]
"""By `STATE_NAMES`."""


def hold_standard(
    layer: StandardMoE, state: TrainingState, mesh: Mesh, fit: LayerTokens, check: LayerTokens, usage_E: Tensor
) -> HeldLayer:
    """Reads a layer's local experts and aligns their units to those of the most used expert; collective."""
    group, local = mesh.group(GroupKind.EXPERT_PARALLEL), len(layer.experts.w_in)
    first = group.ranks.index(mesh.rank) * local
    states = [_whole_expert(layer, e, state, mesh) for e in range(local)]
    reference = _broadcast(states, int(usage_E.argmax()), group)
    experts = []
    for e, one in enumerate(states):
        order = align_hidden_units(one[MASTER], reference)
        experts.append(HeldExpert(first + e, _ordered(one, order), fit[first + e], check[first + e]))
    return HeldLayer(experts, {expert: expert // local for expert in range(layer.moe.experts)}, group)


def _whole_expert(layer: StandardMoE, e: int, state: TrainingState, mesh: Mesh) -> States:
    device = layer.router.weight.device
    w_in, w_out = (
        OwnedState.of(state, parameter, mesh).whole(device)
        for parameter in (layer.experts.w_in[e], layer.experts.w_out[e])
    )
    return {kind: ExpertMatrices(w_in[kind], w_out[kind]) for kind in STATE_NAMES}


def _broadcast(states: list[States], expert: int, group: RankGroup) -> ExpertMatrices:
    """One expert's weights, from the rank that holds it."""
    owner, local = divmod(expert, len(states))
    held = states[local][MASTER]
    matrices = ExpertMatrices(held.w_in_DH.clone(), held.w_out_FD.clone())
    if group.size > 1:
        for tensor in (matrices.w_in_DH, matrices.w_out_FD):
            dist.broadcast(tensor, src=group.ranks[owner], group=group.handle)
    return matrices


def _ordered(states: States, order: UnitOrder) -> States:
    """Weights and moments in the new order; squares have no sign."""
    unsigned = UnitOrder(order.order_F, torch.ones_like(order.sign_F))
    return {kind: (unsigned if kind == MOMENTS[1] else order).apply(value) for kind, value in states.items()}
