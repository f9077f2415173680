"""Decision of a re-clustering: exchanges of experts and relocations of clusters, from similarities and loads.

Pure functions; one rank decides for all.

Shapes: E experts, G clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_dist.clustering import assign_balanced, cluster_quality, match_clusters
from moe_dist.clustering.objective import Matrix, affinities, pair_sum, pair_weights
from moe_dist.config import ReclusterConfig
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.recluster.exchange import Cycle, exchanges

LEAST_SAVING = 0.02
"""Least gain of a relocation, as the share of tokens' cluster pairs that come onto one rank; moving bases is costly."""


@dataclass(frozen=True)
class LayerDecision:
    """Exchanges of one layer, and the objective before and after them."""

    cycles: tuple[Cycle, ...]
    objective_before: float
    objective_after: float


def decide_layer(
    similarity_EE: npt.ArrayLike,
    placement: ExpertPlacement,
    load_E: npt.ArrayLike,
    recluster: ReclusterConfig,
    seed: int,
) -> LayerDecision:
    """Search for a better balanced clustering, and choose the exchanges that gain enough, the best first.

    An exchange must raise the mean similarity of its movers to their cluster by more than `recluster.threshold`. All
    exchanges together move at most the share `recluster.max_moved` of the experts. The gain of an exchange is E / 2
    times the gain of the objective per mover: the objective is a mean over E experts, and a mover changes the
    similarity of the other members as much as its own.
    """
    weight = recluster.load_weight
    old_E = np.array(placement.cluster_of())
    found = assign_balanced(similarity_EE, placement.clusters, seed=seed, start=old_E, loads=load_E, load_weight=weight)
    match = match_clusters(placement.members, found.groups)
    new_E = [0] * placement.experts
    for cluster, members in enumerate(match.members):
        for expert in members:
            new_E[expert] = cluster
    weights_EE = pair_weights(similarity_EE, placement.clusters, load_E, weight)
    kept, labels_E = _select_exchanges(
        exchanges(old_E.tolist(), new_E), old_E, weights_EE, placement.clusters, recluster
    )
    before, after = (objective_of(similarity_EE, labels.tolist(), load_E, recluster) for labels in (old_E, labels_E))
    return LayerDecision(tuple(kept), before, after)


def objective_of(
    similarity_EE: npt.ArrayLike, labels_E: Sequence[int], load_E: npt.ArrayLike, recluster: ReclusterConfig
) -> float:
    """Return the objective of a clustering: similarity within clusters minus load imbalance (`ClusterQuality`)."""
    return cluster_quality(similarity_EE, labels_E, load_E, recluster.load_weight).objective


def _select_exchanges(
    cycles: Sequence[Cycle], labels_E: npt.NDArray[np.int64], weights_EE: Matrix, clusters: int, limits: ReclusterConfig
) -> tuple[list[Cycle], npt.NDArray[np.int64]]:
    """Select exchanges that gain enough until `max_moved` is reached; return them and the labels after them."""
    experts = len(labels_E)
    room = int(limits.max_moved * experts)

    def value(labels: npt.NDArray[np.int64]) -> float:
        return pair_sum(affinities(weights_EE, labels, clusters), labels)

    def after(cycle: Cycle, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        moved = labels.copy()
        moved[list(cycle)] = labels[[*cycle[1:], cycle[0]]]
        return moved

    def gain(cycle: Cycle, labels: npt.NDArray[np.int64]) -> float:
        """Return the gain of the mean similarity of a mover to its cluster."""
        return (value(after(cycle, labels)) - value(labels)) * experts / (2 * len(cycle))

    start, kept = labels_E, []
    for cycle in sorted(cycles, key=lambda cycle: -gain(cycle, start)):
        if len(cycle) <= room and gain(cycle, labels_E) > limits.threshold:
            kept.append(cycle)
            labels_E = after(cycle, labels_E)
            room -= len(cycle)
    return kept, labels_E


def decide_blocks(together_GG: npt.ArrayLike, placement: ExpertPlacement, seed: int) -> tuple[int, ...]:
    """Choose the block of each cluster, so that clusters chosen by the same tokens are on one rank.

    Args:
        together_GG: number of tokens that chose both of two clusters, symmetric, not negative.

    Returns:
        The block of each cluster; unchanged if the gain is less than `LEAST_SAVING`.
    """
    together = np.array(together_GG, dtype=np.float64)
    np.fill_diagonal(together, 0.0)
    blocks = placement.block_of_cluster
    if placement.blocks == 1 or placement.clusters_per_block == 1 or not together.sum() > 0:
        return blocks
    share_GG = together / together.sum()
    found = assign_balanced(share_GG, placement.blocks, seed=seed, start=blocks)
    if _share_on_one_rank(share_GG, found.labels) - _share_on_one_rank(share_GG, blocks) < LEAST_SAVING:
        return blocks
    old = [placement.clusters_of_block(block) for block in range(placement.blocks)]
    kept = match_clusters(old, found.groups).members
    return tuple(next(block for block, clusters in enumerate(kept) if c in clusters) for c in range(placement.clusters))


def _share_on_one_rank(share_GG: Matrix, labels: Sequence[int]) -> float:
    labels_G = np.asarray(labels)
    return float(share_GG[labels_G[:, None] == labels_G[None, :]].sum())
