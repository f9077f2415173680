"""Conversion of a standard model under training into a clustered one.

It has two halves, so that the standard model and its optimizer can be freed in between: `read_clustered` computes this
rank's share of a clustered model's initial state; `write_clustered` writes it into the new model.

Shapes: L layers, E experts, G clusters, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_dist.clustering import FusedSimilarity, cluster_quality
from moe_dist.config import RunConfig
from moe_dist.conversion.calibration_tokens import LayerTokens, standard_layers
from moe_dist.conversion.compress import CompressedLayer, compress_clusters, mean_weights
from moe_dist.conversion.expert_grouping import members_of, similarity_of, usage_of
from moe_dist.conversion.full_experts import FullExpertLayer
from moe_dist.conversion.read_standard_experts import read_standard_experts
from moe_dist.conversion.write_parameters import write_cluster
from moe_dist.distributed.agreement import gather_over_stages
from moe_dist.distributed.collective_errors import raise_on_all_ranks
from moe_dist.distributed.mesh import Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.gathered_optimizer_state import OwnedState, write_whole
from moe_dist.engine.optimizer_state import MASTER, OptimizerState
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.parameter_class import OF_EXPERTS, class_of
from moe_dist.moe.standard_moe import StandardMoE


@dataclass(frozen=True)
class ConvertedLayer:
    """Placement and figures of a layer, the same on all ranks.

    Attributes:
        figures_E3: approximation errors of all experts (`CompressedLayer.figures`).
        similarity: mean similarity within clusters, fused and by its parts.
        bytes: bytes sent between ranks.
    """

    placement: ExpertPlacement
    figures_E3: Tensor
    similarity: dict[str, float]
    bytes: int


@dataclass(frozen=True)
class ClusteredStart:
    """Initial state of a clustered model, this rank's share.

    Attributes:
        dense: parameters outside of the experts, routers included, by name in the clustered model.
        compressed: layers of this pipeline stage by number.
        layers: figures of all layers of the model, in order.
    """

    steps: int
    dense: dict[str, OwnedState]
    compressed: dict[int, CompressedLayer]
    layers: list[ConvertedLayer]
    expert_bias_LE: Tensor


def read_clustered(
    model: LanguageModel,
    state: OptimizerState,
    config: RunConfig,
    fit: Sequence[LayerTokens],
    check: Sequence[LayerTokens],
) -> ClusteredStart:
    """Cluster and compress the experts of a standard model, layer by layer; collective.

    Args:
        config: configuration of the clustered model.
        fit, check: calibration tokens of two different batches, by layer (`sample_tokens`).
    """
    mesh, compressed, converted = model.context.mesh, {}, {}
    with raise_on_all_ranks():  # the ranks of a stage fail together, and those of other stages with them
        for index, layer in enumerate(standard_layers(model)):
            usage_E = usage_of(fit[index], check[index], config.moe.experts, layer.dispatcher.all_to_all.group)
            held = read_standard_experts(layer, state, mesh, fit[index], check[index], usage_E)
            made, similarity = cluster_layer(held, layer, usage_E, config, mesh)
            compressed[layer.layer] = made
            converted[layer.layer] = ConvertedLayer(made.placement, made.figures, similarity, made.bytes)
    of_model = dict(item for of_stage in gather_over_stages(mesh, converted) for item in of_stage.items())
    dense = {
        name: OwnedState.of(state, parameter, mesh).copy()
        for name, parameter in model.named_parameters()
        if class_of(parameter) not in OF_EXPERTS
    }
    layers = [of_model[number] for number in sorted(of_model)]
    return ClusteredStart(state.steps, dense, compressed, layers, model.context.balance.expert_bias_LE.clone())


def cluster_layer(
    held: FullExpertLayer, layer: StandardMoE, usage_E: Tensor, config: RunConfig, mesh: Mesh
) -> tuple[CompressedLayer, dict[str, float]]:
    """Group and compress the experts of one layer; return also the mean similarity within clusters. Collective."""
    moe = config.moe
    similarity = similarity_of(held, layer.router.weight_ED, usage_E, config)
    members = members_of(similarity, usage_E, config, mesh)
    placement = ExpertPlacement.contiguous(moe.experts, moe.clusters, mesh.shape).with_members(members)
    if moe.two_level_base:
        held = replace(held, shared=mean_weights(held, range(moe.experts), usage_E).float())
    made = compress_clusters(held, placement, usage_E, moe, mesh, config.seed, range(moe.clusters))
    return CompressedLayer(placement, list(made), held.shared), _within(similarity, members)


def write_clustered(start: ClusteredStart, model: LanguageModel, state: OptimizerState) -> None:
    """Write the initial state into a clustered model and its optimizer; collective."""
    context, device = model.context, model.context.balance.expert_bias_LE.device
    context.placements[:] = [layer.placement for layer in start.layers]
    for layer in model.clustered_layers():
        layer.follow_placement()
        compressed = start.compressed[layer.layer]
        for cluster in compressed.clusters:
            write_cluster(cluster, layer.placement, layer, state)
        if (shared := compressed.shared) is not None and layer.shared_base is not None:
            for name, parameter in layer.shared_base.named_parameters():
                write_whole(state, parameter, {MASTER: getattr(shared, name)})
    for name, parameter in model.named_parameters():
        if class_of(parameter) not in OF_EXPERTS and ".shared_base." not in name:
            write_whole(state, parameter, start.dense[name].whole(device))
    state.steps = start.steps
    _write_biases(start, model)


def _within(similarity: FusedSimilarity, members: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the mean similarity within clusters, fused and by its parts."""
    cluster_of = {expert: cluster for cluster, group in enumerate(members) for expert in group}
    labels = [cluster_of[expert] for expert in range(len(cluster_of))]
    parts = {"fused": similarity.fused_EE, **similarity.parts}
    return {name: cluster_quality(part.cpu().numpy(), labels).similarity for name, part in parts.items()}


def _write_biases(start: ClusteredStart, model: LanguageModel) -> None:
    """Copy the experts' selection biases; a cluster's is their sum over sqrt(n), like its prototype's score."""
    balance = model.context.balance
    balance.expert_bias_LE.copy_(start.expert_bias_LE)
    for number, layer in enumerate(start.layers):
        member_GN = torch.tensor(layer.placement.members, device=balance.expert_bias_LE.device)
        bias_GN = start.expert_bias_LE[number][member_GN]
        balance.cluster_bias_LG[number] = bias_GN.sum(1) / bias_GN.shape[1] ** 0.5
