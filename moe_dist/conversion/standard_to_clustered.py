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
from moe_dist.distributed.mesh import Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.gathered_optimizer_state import OwnedState, write_whole
from moe_dist.engine.optimizer_state import MASTER, OptimizerState
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.parameter_class import OF_EXPERTS, class_of
from moe_dist.moe.standard_moe import StandardMoE


@dataclass(frozen=True)
class ClusteredStart:
    """Initial state of a clustered model, this rank's share."""

    steps: int
    dense: dict[str, OwnedState]
    """Parameters outside of the experts, routers included, by name in the clustered model."""
    layers: list[CompressedLayer]
    expert_bias_LE: Tensor
    similarity: dict[str, float]
    """Mean similarity within clusters over the layers, fused and by its parts."""


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
    mesh, layers, alike = model.context.mesh, [], []
    for number, layer in enumerate(standard_layers(model)):
        usage_E = usage_of(fit[number], check[number], config.moe.experts, layer.dispatcher.all_to_all.group)
        held = read_standard_experts(layer, state, mesh, fit[number], check[number], usage_E)
        compressed, similarity = cluster_layer(held, layer, usage_E, config, mesh)
        layers.append(compressed)
        alike.append(similarity)
    dense = {
        name: OwnedState.of(state, parameter, mesh).copy()
        for name, parameter in model.named_parameters()
        if class_of(parameter) not in OF_EXPERTS
    }
    means = {name: sum(one[name] for one in alike) / len(alike) for name in alike[0]}
    return ClusteredStart(state.steps, dense, layers, model.context.balance.expert_bias_LE.clone(), means)


def cluster_layer(
    held: FullExpertLayer, layer: StandardMoE, usage_E: Tensor, config: RunConfig, mesh: Mesh
) -> tuple[CompressedLayer, dict[str, float]]:
    """Group and compress the experts of one layer; return also the mean similarity within clusters. Collective."""
    moe = config.moe
    similarity = similarity_of(held, layer.router.weight_ED, usage_E, config)
    members = members_of(similarity, usage_E, config)
    placement = ExpertPlacement.contiguous(moe.experts, moe.clusters, mesh.shape).with_members(members)
    if moe.two_level_base:
        held = replace(held, shared=mean_weights(held, range(moe.experts), usage_E).float())
    made = compress_clusters(held, placement, usage_E, moe, mesh, config.seed, range(moe.clusters))
    return CompressedLayer(placement, list(made), held.shared), _within(similarity, members)


def write_clustered(start: ClusteredStart, model: LanguageModel, state: OptimizerState) -> None:
    """Write the initial state into a clustered model and its optimizer; collective."""
    context, device = model.context, model.context.balance.expert_bias_LE.device
    for number, layer in enumerate(model.clustered_layers()):
        context.placements[number] = start.layers[number].placement
        layer.follow_placement()
        for cluster in start.layers[number].clusters:
            write_cluster(cluster, layer.placement, layer, state)
        if (shared := start.layers[number].shared) is not None and layer.shared_base is not None:
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
    for number, compressed in enumerate(start.layers):
        member_GN = torch.tensor(compressed.placement.members, device=balance.expert_bias_LE.device)
        bias_GN = start.expert_bias_LE[number][member_GN]
        balance.cluster_bias_LG[number] = bias_GN.sum(1) / bias_GN.shape[1] ** 0.5
