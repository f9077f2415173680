"""Similarities of experts for re-clustering, gathered from the statistics and sketches of all ranks.

Shapes: L layers, E experts, G clusters, S entries of an expert's sketch, D model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.clustering import (
    ActivationStatistics,
    centroid_similarity,
    cluster_quality,
    fuse,
    gated_projections,
    router_similarity,
    sketch_weights,
    sketched_parameter_similarity,
)
from moe_dist.clustering.similarity import FusedSimilarity
from moe_dist.config import RunConfig
from moe_dist.distributed.agreement import gather_over_stages
from moe_dist.distributed.mesh import GroupKind
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.layer_context import LayerContext


@dataclass(frozen=True)
class GatheredSimilarity:
    """Similarities and statistics for the decision, the same on all ranks."""

    similarity_LEE: list[npt.NDArray[np.float64]]
    together_LGG: list[npt.NDArray[np.float64]]
    broken: tuple[str, ...]
    """Terms with NaN or infinity in any layer; the round is then skipped."""
    parts: dict[str, float]
    """Mean similarity within the current clusters by term, mean over layers."""


class _LayerSimilarity(NamedTuple):
    """Similarity of one layer's experts, terms that are not finite, and means within clusters by term."""

    similarity_EE: npt.NDArray[np.float64]
    broken: Sequence[str]
    within: dict[str, float]


def gather_similarity(layers: list[ClusteredMoE], config: RunConfig, context: LayerContext) -> GatheredSimilarity:
    """Sum the statistics and sketches of all ranks; collective. Non-finite statistics are reset.

    Args:
        layers: layers of this rank's pipeline stage; the result is of those of all stages.
    """
    assert context.statistics is not None
    together = context.statistics.together_LGG.clone()
    dist.all_reduce(together)
    strategy, found = SIMILARITIES[config.recluster.similarity], {}
    for layer in layers:
        fused = _similarity(layer, config, context)
        found[layer.layer] = _LayerSimilarity(
            strategy(fused, layer.layer, config), fused.not_finite, _within_clusters(fused, layer)
        )
    of_stages = gather_over_stages(context.mesh, found)
    of_layers = [one for _, one in sorted(item for of_stage in of_stages for item in of_stage.items())]
    broken = sorted({name for one in of_layers for name in one.broken})
    if broken:
        for statistics in context.statistics.activation:
            statistics.reset()
    names = [] if broken else of_layers[0].within
    means = {name: sum(one.within[name] for one in of_layers) / len(of_layers) for name in names}
    similarity = [one.similarity_EE for one in of_layers]
    return GatheredSimilarity(similarity, list(together.cpu().double().numpy()), tuple(broken), means)


def _within_clusters(fused: FusedSimilarity, layer: ClusteredMoE) -> dict[str, float]:
    """Return the mean similarity within the current clusters by term; none if a term is not finite."""
    cluster_of = layer.placement.cluster_of()
    parts = {} if fused.not_finite else fused.parts
    return {name: cluster_quality(part_EE.cpu().numpy(), cluster_of).similarity for name, part_EE in parts.items()}


def _similarity(layer: ClusteredMoE, config: RunConfig, context: LayerContext) -> FusedSimilarity:
    recluster = config.recluster
    parameter = _parameter_similarity(layer, config, context) if recluster.alpha > 0 else None
    centroid = router = None
    if recluster.alpha < 1 and recluster.router_weight < 1:
        centroid = centroid_similarity(_summed_statistics(layer, context))
    if recluster.alpha < 1 and recluster.router_weight > 0:
        router = router_similarity(layer.router.weight_ED.detach().float())
    return fuse(parameter, centroid, router, alpha=recluster.alpha, router_weight=recluster.router_weight)


def _summed_statistics(layer: ClusteredMoE, context: LayerContext) -> ActivationStatistics:
    assert context.statistics is not None
    mine = context.statistics.activation[layer.layer]
    weighted_ED, mass_E = mine.weighted_ED.clone(), mine.mass_E.clone()
    for tensor in (weighted_ED, mass_E):
        dist.all_reduce(tensor, group=context.mesh.stage_group)
    return ActivationStatistics(weighted_ED, mass_E, mine.steps, mine.decay)


def _parameter_similarity(layer: ClusteredMoE, config: RunConfig, context: LayerContext) -> Tensor:
    """Return the similarity of the experts' residuals, from sketches that each rank computes of its own experts."""
    experts: list[int] = []
    sketches: list[Tensor] = []
    shard, block = context.mesh.at.shard, context.mesh.at.cluster
    for cluster, part in zip(layer.placement.clusters_of_block(block), layer.clusters, strict=True):
        assert isinstance(part, ClusteredExperts)
        experts += layer.placement.experts_of(cluster, shard)
        with part.present():
            sketches.append(_sketch(part, config))
    mine_NS = torch.cat(sketches)
    sketch_ES = mine_NS.new_zeros(layer.placement.experts, mine_NS.shape[1])
    sketch_ES[experts] = mine_NS
    group = context.mesh.group(GroupKind.EXPERT_PARALLEL)
    if group.size > 1:
        dist.all_reduce(sketch_ES, group=group.handle)
    return sketched_parameter_similarity(sketch_ES)


@torch.no_grad()
def _sketch(part: ClusteredExperts, config: RunConfig) -> Tensor:
    weights = part.weights()
    projections = gated_projections(
        torch.zeros_like(weights.base_in_DH)[None],  # the similarity of whole weights reflects the base (ADR 26)
        torch.zeros_like(weights.base_out_FD)[None],
        torch.zeros(weights.experts, dtype=torch.int64, device=weights.base_in_DH.device),
        weights.in_u_NDR,
        weights.in_v_NRH,
        weights.out_u_NFR,
        weights.out_v_NRD,
    )
    return sketch_weights(projections, config.seed, config.recluster.sketch_size)


def _fused(similarity: FusedSimilarity, layer: int, config: RunConfig) -> npt.NDArray[np.float64]:
    return np.asarray(similarity.fused_EE.cpu().numpy())


def _random(similarity: FusedSimilarity, layer: int, config: RunConfig) -> npt.NDArray[np.float64]:
    """Return a random similarity, the same in every round."""
    drawn = np.random.default_rng([config.seed, layer]).standard_normal((config.moe.experts,) * 2)
    return np.asarray((drawn + drawn.T) / 2)


SIMILARITIES: dict[str, Callable[[FusedSimilarity, int, RunConfig], npt.NDArray[np.float64]]] = {
    "fused": _fused,
    "random": _random,
}
"""Similarities of a layer's experts by the value of `recluster.similarity`."""
