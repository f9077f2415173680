"""Full experts of a standard layer, with their hidden units in a common order."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.compression import ExpertMatrices, UnitOrder, align_hidden_units
from moe_dist.conversion.calibration_tokens import LayerTokens
from moe_dist.conversion.full_experts import FullExpert, FullExpertLayer
from moe_dist.distributed.mesh import GroupKind, Mesh, RankGroup
from moe_dist.engine.gathered_optimizer_state import OwnedState, read_offloaded
from moe_dist.engine.optimizer_state import MASTER, OptimizerState
from moe_dist.errors import TrainingError
from moe_dist.moe.standard_moe import StandardMoE

Load = Callable[[], ExpertMatrices]


def read_standard_experts(
    layer: StandardMoE, state: OptimizerState, mesh: Mesh, fit: LayerTokens, check: LayerTokens, usage_E: Tensor
) -> FullExpertLayer:
    """Return a layer's local experts, their units aligned to those of the most used expert; collective.

    Raises:
        TrainingError: on all ranks of the layer's stage, if an expert of any of them holds NaN or infinity.
    """
    loads = [_loader(layer, e, state, mesh) for e in range(len(layer.experts.w_in))]
    return align_experts(layer, loads, mesh, fit, check, usage_E)


def align_experts(
    layer: StandardMoE, loads: Sequence[Load], mesh: Mesh, fit: LayerTokens, check: LayerTokens, usage_E: Tensor
) -> FullExpertLayer:
    """Return the local experts of functions that load their weights, with the same alignment and errors; collective."""
    group, local, first = mesh.group(GroupKind.EXPERT_PARALLEL), len(loads), layer.first_expert
    _require_finite(loads, first, layer, mesh)
    reference = _broadcast(loads, int(usage_E.argmax()), group)
    experts = []
    for e, load in enumerate(loads, first):
        order = align_hidden_units(load(), reference)
        experts.append(FullExpert(e, partial(_aligned, load, order), fit[e], check[e]))
    zeros = ExpertMatrices(torch.zeros_like(reference.w_in_DH), torch.zeros_like(reference.w_out_FD))
    holder_of = {expert: expert // local for expert in range(layer.moe.experts)}
    return FullExpertLayer(experts, holder_of, group, (MASTER,), zeros)


def _loader(layer: StandardMoE, e: int, state: OptimizerState, mesh: Mesh) -> Load:
    """Return a function that returns an expert's whole weights: gathered now (collective), or loaded if offloaded."""
    parameters, device = (layer.experts.w_in[e], layer.experts.w_out[e]), layer.router.weight_ED.device
    if state.is_offloaded(parameters[0]):
        return lambda: ExpertMatrices(*(read_offloaded(state, parameter) for parameter in parameters))
    whole = ExpertMatrices(*(OwnedState.of(state, one, mesh).whole(device)[MASTER] for one in parameters))
    return lambda: whole


def _aligned(load: Load, order: UnitOrder) -> ExpertMatrices:
    return order.apply(load())


def _broadcast(loads: Sequence[Load], expert: int, group: RankGroup) -> ExpertMatrices:
    """Broadcast one expert's weights from the rank that holds it."""
    owner, local = divmod(expert, len(loads))
    whole = loads[local]()
    matrices = ExpertMatrices(whole.w_in_DH.clone(), whole.w_out_FD.clone())
    if group.size > 1:
        for tensor in (matrices.w_in_DH, matrices.w_out_FD):
            dist.broadcast(tensor, src=group.ranks[owner], group=group.handle)
    return matrices


def _require_finite(loads: Sequence[Load], first: int, layer: StandardMoE, mesh: Mesh) -> None:
    broken_E = torch.zeros(layer.moe.experts, device=layer.router.weight_ED.device)
    for e, load in enumerate(loads, first):
        broken_E[e] = not all(bool(w.isfinite().all()) for w in load().projections())
    dist.all_reduce(broken_E, group=mesh.stage_group)
    if broken_E.any():
        experts = ", ".join(map(str, broken_E.nonzero().flatten().tolist()))
        raise TrainingError(
            f"experts cannot be clustered: weights of expert {experts} of layer {layer.layer} are NaN or infinite. "
            "Lower optimizer.learning_rate, or train in float32"
        )
