"""The standard experts that a rank holds: weights in float32, Adam's moments, and tokens they are given."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.compression import ExpertMatrices, UnitOrder, align_hidden_units
from moe_dist.engine.training_state import MASTER, MOMENTS, STATE_NAMES, TrainingState
from moe_dist.engine.whole_state import OwnedState
from moe_dist.model.standard_layer import StandardMoE
from moe_dist.topology.mesh import GroupKind, Mesh, RankGroup


@dataclass(frozen=True)
class HeldExpert:
    """One standard expert, its hidden units in an order that all experts of its layer share."""

    number: int
    state: dict[str, ExpertMatrices]
    """By `STATE_NAMES`."""
    fit_LD: Tensor
    check_LD: Tensor
    """Tokens of two different batches."""

    @property
    def matrices(self) -> ExpertMatrices:
        return self.state[MASTER]


@dataclass(frozen=True)
class HeldLayer:
    """The experts of a layer that this rank holds, and the ranks that together hold all of them."""

    experts: list[HeldExpert]
    total: int
    group: RankGroup


def hold_layer(
    layer: StandardMoE, state: TrainingState, mesh: Mesh, fit: list[Tensor], check: list[Tensor], usage_E: Tensor
) -> HeldLayer:
    """Reads a layer's local experts and aligns their units to those of the most used expert; collective."""
    device = layer.router.weight.device
    group = mesh.group(GroupKind.EXPERT_PARALLEL)
    local = len(layer.experts.w_in)
    first = group.ranks.index(mesh.rank) * local
    whole = [
        {
            name: ExpertMatrices(w_in, w_out)
            for name, w_in, w_out in zip(
                STATE_NAMES,
                OwnedState.of(state, layer.experts.w_in[e], mesh).whole(device).values(),
                OwnedState.of(state, layer.experts.w_out[e], mesh).whole(device).values(),
                strict=True,
            )
        }
        for e in range(local)
    ]
    reference = _broadcast(whole, int(usage_E.argmax()), first, group)
    experts = []
    for e, states in enumerate(whole):
        order = align_hidden_units(states[MASTER], reference)
        experts.append(HeldExpert(first + e, _ordered(states, order), fit[e], check[e]))
    return HeldLayer(experts, layer.moe.experts, group)


def _broadcast(whole: list[dict[str, ExpertMatrices]], expert: int, first: int, group: RankGroup) -> ExpertMatrices:
    """One expert's weights, from the rank that holds it."""
    owner, local = divmod(expert, len(whole))
    held = whole[local][MASTER]
    matrices = ExpertMatrices(held.w_in_DH.clone(), held.w_out_FD.clone())
    if group.size > 1:
        for tensor in (matrices.w_in_DH, matrices.w_out_FD):
            dist.broadcast(tensor, src=group.ranks[owner], group=group.handle)
    return matrices


def _ordered(states: dict[str, ExpertMatrices], order: UnitOrder) -> dict[str, ExpertMatrices]:
    """Weights and moments in the new order; squares have no sign."""
    unsigned = UnitOrder(order.order_F, torch.ones_like(order.sign_F))
    return {name: (unsigned if name == MOMENTS[1] else order).apply(value) for name, value in states.items()}
