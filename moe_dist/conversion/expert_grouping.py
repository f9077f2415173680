"""Grouping of a layer's standard experts into clusters, and their usage.

Shapes: E experts, N local experts, S entries of a sketch, D hidden, G clusters.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.clustering import (
    ActivationStatistics,
    FactoredProjection,
    FusedSimilarity,
    assign_balanced,
    centroid_similarity,
    fuse,
    router_similarity,
    sketch_weights,
    sketched_parameter_similarity,
)
from moe_dist.compression import ExpertMatrices
from moe_dist.config import RunConfig
from moe_dist.conversion.calibration_tokens import LayerTokens
from moe_dist.conversion.full_experts import FullExpertLayer
from moe_dist.distributed.mesh import Mesh, RankGroup


def usage_of(fit: LayerTokens, check: LayerTokens, experts: int, group: RankGroup) -> Tensor:
    """Return the number of tokens of each expert of a layer, float64 [E]; collective."""
    usage_E = torch.zeros(experts, dtype=torch.float64, device=next(iter(fit.values())).device)
    for expert in fit:
        usage_E[expert] = len(fit[expert]) + len(check[expert])
    if group.size > 1:
        dist.all_reduce(usage_E, group=group.handle)
    return usage_E


def similarity_of(layer: FullExpertLayer, router_ED: Tensor, usage_E: Tensor, config: RunConfig) -> FusedSimilarity:
    """Compute the fused similarity of weights, token centroids and router rows (`recluster.*` weights); collective.

    Weights count only if all experts started from one draw (`moe.shared_init`): otherwise their hidden units are in
    different orders, and they resemble each other by chance only (ADR 26).
    """
    recluster, comparable = config.recluster, config.moe.shared_init
    parameter_EE = None
    if comparable:
        sketch_ES = gather_rows(_sketches(layer, config.seed, recluster.sketch_size), layer.group)
        parameter_EE = sketched_parameter_similarity(sketch_ES)
    centroids = [torch.cat([e.fit_LD, e.check_LD]).double().sum(0).float() for e in layer.experts]
    weighted_ED = gather_rows(torch.stack(centroids), layer.group)
    statistics = ActivationStatistics(weighted_ED, usage_E.float(), torch.ones((), dtype=torch.float64), 0.0)
    return fuse(
        parameter_EE,
        centroid_similarity(statistics),
        router_similarity(router_ED.detach().float()),
        alpha=recluster.alpha if comparable else 0.0,
        router_weight=recluster.router_weight,
    )


def members_of(
    similarity: FusedSimilarity, usage_E: Tensor, config: RunConfig, mesh: Mesh
) -> tuple[tuple[int, ...], ...]:
    """Return the members of each cluster, which the first rank of the layer's stage decides and broadcasts."""
    assignment = assign_balanced(
        similarity.fused_EE.cpu().numpy(),
        config.moe.clusters,
        seed=config.seed,
        loads=usage_E.cpu().numpy(),
        load_weight=config.recluster.load_weight,
    )
    member_GN = torch.tensor(assignment.groups, device=usage_E.device)
    dist.broadcast(member_GN, src=mesh.stage * mesh.shape.stage_ranks, group=mesh.stage_group)
    return tuple(tuple(group) for group in member_GN.tolist())


def gather_rows(x_NS: Tensor, group: RankGroup) -> Tensor:
    """Gather the rows of all ranks of a group, in their order; their number is the same on each."""
    if group.size == 1:
        return x_NS
    found = [torch.empty_like(x_NS) for _ in range(group.size)]
    dist.all_gather(found, x_NS.contiguous(), group=group.handle)
    return torch.cat(found)


def _sketches(layer: FullExpertLayer, seed: int, size: int) -> Tensor:
    """Compute sketches of the local experts' full weights: each is a base of its own, without a residual."""
    return torch.cat([sketch_weights(_bases(expert.load()), seed, size) for expert in layer.experts])


def _bases(expert: ExpertMatrices) -> list[FactoredProjection]:
    only = torch.zeros(1, dtype=torch.int64, device=expert.w_out_FD.device)
    return [
        FactoredProjection(w_IO[None], only, w_IO.new_zeros(1, len(w_IO), 0), w_IO.new_zeros(1, 0, w_IO.shape[1]))
        for w_IO in expert.projections()
    ]
