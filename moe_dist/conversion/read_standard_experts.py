"""Full experts of a standard layer, with their hidden units in a common order."""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.compression import ExpertMatrices, align_hidden_units
from moe_dist.conversion.calibration_tokens import LayerTokens
from moe_dist.conversion.full_experts import FullExpert, FullExpertLayer
from moe_dist.distributed.mesh import GroupKind, Mesh, RankGroup
from moe_dist.engine.gathered_optimizer_state import OwnedState
from moe_dist.engine.optimizer_state import MASTER, OptimizerState
from moe_dist.errors import TrainingError
from moe_dist.moe.standard_moe import StandardMoE


def read_standard_experts(
    layer: StandardMoE, state: OptimizerState, mesh: Mesh, fit: LayerTokens, check: LayerTokens, usage_E: Tensor
) -> FullExpertLayer:
    """Read a layer's local experts and align their units to those of the most used expert; collective.

    Raises:
        TrainingError: on all ranks, if an expert of any rank holds NaN or infinity.
    """
    group, local = mesh.group(GroupKind.EXPERT_PARALLEL), len(layer.experts.w_in)
    first = layer.first_expert
    whole = [_whole_expert(layer, e, state, mesh) for e in range(local)]
    _require_finite(whole, first, layer)
    reference = _broadcast(whole, int(usage_E.argmax()), group)
    experts = []
    for e, matrices in enumerate(whole, first):
        aligned = align_hidden_units(matrices, reference).apply(matrices)
        experts.append(FullExpert(e, aligned, fit[e], check[e]))
    return FullExpertLayer(experts, {expert: expert // local for expert in range(layer.moe.experts)}, group, (MASTER,))


def _whole_expert(layer: StandardMoE, e: int, state: OptimizerState, mesh: Mesh) -> ExpertMatrices:
    device = layer.router.weight_ED.device
    w_in, w_out = (
        OwnedState.of(state, parameter, mesh).whole(device)[MASTER]
        for parameter in (layer.experts.w_in[e], layer.experts.w_out[e])
    )
    return ExpertMatrices(w_in, w_out)


def _broadcast(whole: list[ExpertMatrices], expert: int, group: RankGroup) -> ExpertMatrices:
    """Broadcast one expert's weights from the rank that holds it."""
    owner, local = divmod(expert, len(whole))
    matrices = ExpertMatrices(whole[local].w_in_DH.clone(), whole[local].w_out_FD.clone())
    if group.size > 1:
        for tensor in (matrices.w_in_DH, matrices.w_out_FD):
            dist.broadcast(tensor, src=group.ranks[owner], group=group.handle)
    return matrices


def _require_finite(whole: list[ExpertMatrices], first: int, layer: StandardMoE) -> None:
    broken_E = torch.zeros(layer.moe.experts, device=layer.router.weight_ED.device)
    for e, matrices in enumerate(whole, first):
        broken_E[e] = not all(bool(w.isfinite().all()) for w in matrices.projections())
    dist.all_reduce(broken_E)
    if broken_E.any():
        experts = ", ".join(map(str, broken_E.nonzero().flatten().tolist()))
        raise TrainingError(
            f"experts cannot be clustered: weights of expert {experts} of layer {layer.layer} are NaN or infinite. "
            "Lower optimizer.learning_rate, or train in float32"
        )
